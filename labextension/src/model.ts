/** What the panel knows: the pools, the jobs in view, and whether the server answers. Views render from here. */

import { Poll } from '@lumino/polling';
import type { IStream } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';

import type { IApi, JobAction } from './api';
import { RequestError } from './api';
import { JobModel } from './jobmodel';
import type { IFilter, IJob, IJobsPage, IPool, JobState } from './types';
import { isFinal } from './types';

export const JOBS_SCHEMA = 'https://jupyter.org/jupyter_hybrid/jobs/v1';
export const POOLS_SCHEMA = 'https://jupyter.org/jupyter_hybrid/pools/v1';

const PAGE = 200;
/** Milliseconds between two counts of all jobs while news come in. */
const COUNT_APART = 1000;

export interface IEvent {
  schema_id: string;
  /** The last change that is told here, and the last that the message before told. */
  seq?: number;
  since?: number;
  jobs?: IJob[];
  removed?: string[];
  more?: boolean;
  reset?: boolean;
  pools?: IPool[];
}

/** How it stands with the server. */
export type Connection = 'loading' | 'live' | 'gone' | 'missing' | 'refused' | 'error';

const CONNECTIONS: Record<number, Connection> = {
  401: 'refused',
  403: 'refused',
  404: 'missing',
  502: 'gone',
  503: 'gone',
  504: 'gone'
};

export class HybridModel {
  constructor(
    readonly api: IApi,
    events: IStream<unknown, unknown>,
    options: { refresh?: number; standby?: Poll.Standby } = {}
  ) {
    this.events = events;
    events.connect(this.onEvent, this);
    // Events bring the news; the poll finds out what they missed, and whether the server is still there.
    const interval = (options.refresh ?? 10) * 1000;
    this.poll = new Poll({
      name: 'jupyter-hybrid',
      factory: () => this.catchUp(),
      frequency: { interval, backoff: true, max: Math.max(30_000, interval) },
      standby: options.standby ?? 'when-hidden'
    });
  }

  readonly changed = new Signal<this, void>(this);
  /** A job that was seen unfinished has ended. */
  readonly ended = new Signal<this, IJob>(this);
  /** A job was chosen from elsewhere and is to be shown. */
  readonly chosen = new Signal<this, string>(this);

  pools: IPool[] = [];
  /** The jobs in view, as far as they are loaded: the newest first. */
  jobs: IJob[] = [];
  total = 0;
  counts: Partial<Record<JobState, number>> = {};
  filter: IFilter = { state: [], pool: '', name: '' };
  connection: Connection = 'loading';
  /** What the server, or the network, said last. */
  error = '';
  hint = '';
  /** When the server was last heard of, in milliseconds since the epoch. */
  heard = 0;
  /** Whether the list for the present filter is still to come. */
  loading = true;
  selected: JobModel | null = null;

  get hasMore(): boolean {
    return this.next !== null;
  }

  get filtered(): boolean {
    return this.filter.state.length > 0 || this.filter.pool !== '' || this.filter.name !== '';
  }

  get isDisposed(): boolean {
    return this.poll.isDisposed;
  }

  dispose(): void {
    if (this.isDisposed) {
      return;
    }
    this.events.disconnect(this.onEvent, this);
    this.poll.dispose();
    this.selected?.dispose();
    clearTimeout(this.counting);
    Signal.clearData(this);
  }

  /** Seconds between two looks at what the events may have missed. */
  set refresh(seconds: number) {
    const interval = seconds * 1000;
    this.poll.frequency = { interval, backoff: true, max: Math.max(30_000, interval) };
  }

  /** Ask the server for everything now. */
  async reload(): Promise<void> {
    this.fresh = false;
    await this.poll.refresh();
    await this.poll.tick.catch(() => undefined);
  }

  setFilter(filter: Partial<IFilter>): void {
    this.filter = { ...this.filter, ...filter };
    void this.guard(() => this.loadFirst());
  }

  /** Load the next page of jobs, if there is one and none is under way. */
  async loadMore(): Promise<void> {
    if (this.next === null || this.paging) {
      return;
    }
    this.paging = true;
    const round = this.round;
    try {
      await this.guard(async () => {
        const page = await this.api.jobs({ ...this.filter, limit: PAGE, cursor: this.next! });
        if (round === this.round) {
          const known = new Set(this.jobs.map(job => job.id));
          this.jobs = [...this.jobs, ...page.jobs.filter(job => !known.has(job.id))];
          this.next = page.next;
          this.remember(page.jobs);
          this.changed.emit();
        }
      });
    } finally {
      this.paging = false;
    }
  }

  /** Show one job, or none. */
  select(id: string | null): void {
    if (this.selected?.id === id) {
      return;
    }
    this.selected?.dispose();
    this.selected = id === null ? null : new JobModel(this.api, id, this.find(id));
    this.changed.emit();
  }

  /** Show one job wherever the user looks. */
  choose(id: string): void {
    this.select(id);
    this.chosen.emit(id);
  }

  find(id: string): IJob | undefined {
    return this.jobs.find(job => job.id === id);
  }

  /** Cancel, retry, hold or release a job. */
  async act(id: string, action: JobAction, body?: object): Promise<void> {
    this.merge([await this.api.act(id, action, body)]);
    void this.selected?.refresh();
  }

  /** Delete the run folder and the row of a job that has ended. */
  async remove(id: string): Promise<void> {
    await this.api.remove(id);
    this.drop([id]);
    this.countSoon();
  }

  private onEvent(_: unknown, emission: unknown): void {
    const event = emission as IEvent;
    if (event.schema_id === POOLS_SCHEMA && event.pools) {
      this.pools = event.pools;
      this.alive();
      this.changed.emit();
    } else if (event.schema_id === JOBS_SCHEMA && this.fresh) {
      this.alive();
      const { seq = 0, since = 0 } = event;
      if (event.reset) {
        this.fresh = false;
      }
      if (event.reset || event.more || since > this.seq) {
        void this.poll.refresh(); // there is more than this message has, or one before it was missed
      } else if (seq > this.seq) {
        this.seq = seq;
        this.merge(event.jobs ?? []);
        this.drop(event.removed ?? []);
        this.countSoon();
      }
    }
  }

  /** Load everything the first time and after an absence; afterwards only what has changed since. */
  private async catchUp(): Promise<void> {
    try {
      const pools = this.api.pools();
      pools.catch(() => undefined); // told below, where it is waited for
      if (!this.fresh) {
        await this.loadFirst();
        this.fresh = true;
      } else {
        const page = await this.api.jobs({ since: this.seq });
        if (page.reset || page.next !== null) {
          // Too much has changed, or the index was made anew and its numbers begin again.
          await this.loadFirst();
          void this.selected?.refresh();
        } else {
          this.seq = Math.max(this.seq, page.seq);
          this.merge(page.jobs);
          this.drop(page.removed ?? []);
          if (page.jobs.length || page.removed?.length) {
            this.countSoon();
          }
        }
      }
      this.pools = await pools;
      this.alive();
      this.changed.emit();
    } catch (error) {
      this.lost(error);
      throw error;
    }
  }

  private async loadFirst(): Promise<void> {
    const round = ++this.round;
    this.loading = true;
    this.changed.emit();
    const page = await this.api.jobs({ ...this.filter, limit: PAGE });
    if (round !== this.round) {
      return;
    }
    this.jobs = page.jobs;
    this.next = page.next;
    this.seq = page.seq;
    this.loading = false;
    this.count(page);
    this.remember(page.jobs);
    this.changed.emit();
  }

  /** Take over changed rows; of equal rows the one with the larger number is the newer. */
  private merge(rows: IJob[]): void {
    const at = new Map(this.jobs.map((job, index) => [job.id, index]));
    const jobs = this.jobs.slice();
    const fresh: IJob[] = [];
    for (const row of rows) {
      const index = at.get(row.id);
      const old = index === undefined ? undefined : jobs[index];
      if (old && old.seq > row.seq) {
        continue;
      }
      this.remember([row]);
      if (index !== undefined) {
        jobs[index] = row;
      } else if (this.matches(row) && this.inReach(row)) {
        fresh.push(row);
      }
      if (this.selected?.id === row.id) {
        this.selected.update(row);
      }
    }
    const kept = jobs.filter(job => this.matches(job));
    if (fresh.length) {
      this.jobs = [...fresh, ...kept].sort(
        (a, b) => b.created - a.created || (a.id < b.id ? -1 : 1)
      );
    } else {
      this.jobs = kept;
    }
    if (rows.length) {
      this.changed.emit();
    }
  }

  private drop(ids: string[]): void {
    if (!ids.length) {
      return;
    }
    const gone = new Set(ids);
    this.jobs = this.jobs.filter(job => !gone.has(job.id));
    ids.forEach(id => this.unfinished.delete(id));
    if (this.selected && gone.has(this.selected.id)) {
      this.select(null);
    }
    this.changed.emit();
  }

  private remember(rows: IJob[]): void {
    for (const row of rows) {
      if (isFinal(row.state)) {
        if (this.unfinished.delete(row.id)) {
          this.ended.emit(row);
        }
      } else {
        this.unfinished.add(row.id);
      }
    }
  }

  private matches(job: IJob): boolean {
    const { state, pool, name } = this.filter;
    return (
      (!state.length || state.includes(job.state)) &&
      (!pool || job.pool === pool) &&
      (!name || job.name.toLowerCase().includes(name.toLowerCase()) || job.id === name)
    );
  }

  /** Whether a row belongs among those that are loaded, not on a page that is still to come. */
  private inReach(job: IJob): boolean {
    const last = this.jobs[this.jobs.length - 1];
    return this.next === null || last === undefined || job.created >= last.created;
  }

  /** Counts are the server's: the panel has only the jobs in view. */
  private countSoon(): void {
    if (this.counting !== undefined) {
      return;
    }
    this.counting = setTimeout(() => {
      this.counting = undefined;
      const round = this.round;
      void this.guard(async () => {
        const page = await this.api.jobs({ ...this.filter, limit: 1 });
        if (round === this.round) {
          this.count(page);
          this.changed.emit();
        }
      });
    }, COUNT_APART);
  }

  private count(page: IJobsPage): void {
    this.total = page.total;
    this.counts = page.counts;
  }

  private alive(): void {
    this.heard = Date.now();
    this.connection = 'live';
    this.error = this.hint = '';
  }

  private lost(error: unknown): void {
    const status = error instanceof RequestError ? error.status : 0;
    this.connection = CONNECTIONS[status] ?? (status ? 'error' : 'gone');
    this.error = error instanceof Error ? error.message : String(error);
    this.hint = error instanceof RequestError ? error.hint : '';
    this.loading = false;
    this.changed.emit();
  }

  private async guard(request: () => Promise<void>): Promise<void> {
    try {
      await request();
    } catch (error) {
      if (!this.isDisposed) {
        this.lost(error);
      }
    }
  }

  private readonly events: IStream<unknown, unknown>;
  private readonly poll: Poll;
  private readonly unfinished = new Set<string>();
  private fresh = false;
  private seq = 0;
  private next: string | null = null;
  private round = 0;
  private paging = false;
  private counting: ReturnType<typeof setTimeout> | undefined;
}
