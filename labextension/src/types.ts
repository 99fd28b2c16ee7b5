/** What the server says: the shapes of its JSON. Times are seconds since the epoch, memory is in bytes. */

export type JobState =
  'NEW' | 'PENDING' | 'RUNNING' | 'COMPLETED' | 'FAILED' | 'CANCELLED' | 'TIMEOUT' | 'UNKNOWN';

export const STATES: readonly JobState[] = [
  'NEW',
  'PENDING',
  'RUNNING',
  'COMPLETED',
  'FAILED',
  'CANCELLED',
  'TIMEOUT',
  'UNKNOWN'
];

const FINAL = new Set<JobState>(['COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT']);

/** Whether nothing further happens without a retry; UNKNOWN never is final. */
export function isFinal(state: JobState): boolean {
  return FINAL.has(state);
}

export interface IPool {
  name: string;
  kind: string;
  default: boolean;
  cpus_free: number | null;
  cpus_total: number | null;
  gpus_free: number | null;
  gpus_total: number | null;
  memory_free: number | null;
  memory_total: number | null;
  queued: number | null;
  price_cpu_hour: number | null;
  price_gpu_hour: number | null;
  reachable: boolean | null;
  unreachable_since: number | null;
  error: string;
  snapshot_time: number | null;
  active: number;
}

export interface IJob {
  id: string;
  seq: number;
  name: string;
  pool: string;
  kind: string;
  state: JobState;
  cause: string | null;
  reason: string;
  advice: string;
  array: boolean;
  tasks: number;
  done: number;
  failed: number;
  running: number;
  created: number;
  started: number | null;
  ended: number | null;
  native_id: string;
  notebook: string;
  /** The path that the file browser has for it; null where it shows it not. */
  notebook_browser: string | null;
  cell: string | null;
  function: string;
  held: boolean;
  cpus: number;
  memory: number | null;
  time: number | null;
  cpu_seconds: number | null;
  peak_memory: number | null;
  cost: number | null;
}

export interface IFailure {
  message: string;
  count: number;
  tasks: number[];
}

export interface IJobDetail extends IJob {
  folder: string | null;
  folder_browser: string | null;
  resources: Record<string, unknown>;
  used: {
    cpu_seconds: number | null;
    peak_memory: number | null;
    cpu_efficiency: number | null;
    memory_efficiency: number | null;
  };
  inputs: string[];
  outputs: string[];
  origin: { notebook: string; cell: string; directory: string };
  checkpoints: { name: string; size: number; modified: number }[];
  batches: { batch: number; state: JobState; host: string; native_id: string }[];
  last_heartbeat: number | null;
  estimated_start: number | null;
  after: string[];
  attempts: number;
  failures: IFailure[];
}

export interface IJobsPage {
  jobs: IJob[];
  next: string | null;
  total: number;
  counts: Partial<Record<JobState, number>>;
  seq: number;
  /** Only in answers to what has changed since: what is gone, and whether the list must be loaded anew. */
  removed?: string[];
  reset?: boolean;
}

/** One letter for each task: waiting, running, done, failed, lost, cancelled. */
export const TASK_LETTERS = 'wrdflc';

export interface ITaskStates {
  total: number;
  states: string;
}

export interface ITask {
  index: number;
  state: string;
  cause: string | null;
  reason: string;
  seconds: number | null;
  batch: number | null;
}

export interface ILogPart {
  text: string;
  offset: number;
  next: number;
  size: number;
  end: boolean;
}

/** What a list of jobs is narrowed down to; empty values narrow nothing. */
export interface IFilter {
  state: JobState[];
  pool: string;
  name: string;
}
