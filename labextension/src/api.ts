/** The only place that speaks HTTP with the server extension. */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import type {
  IFilter,
  IJob,
  IJobDetail,
  IJobsPage,
  ILogPart,
  IPool,
  ITask,
  ITaskStates
} from './types';

/** What went wrong with a request, in the server's own words. */
export class RequestError extends Error {
  constructor(
    message: string,
    /** HTTP status; 0 where no server answered. */
    readonly status: number,
    readonly hint = ''
  ) {
    super(message);
    this.name = 'RequestError';
  }
}

export type JobAction = 'cancel' | 'retry' | 'hold' | 'release';

export interface IJobsQuery extends Partial<IFilter> {
  limit?: number;
  cursor?: string;
  since?: number;
}

/** The requests that the model makes. */
export interface IApi {
  pools(): Promise<IPool[]>;
  jobs(query: IJobsQuery): Promise<IJobsPage>;
  job(id: string): Promise<IJobDetail>;
  taskStates(id: string): Promise<ITaskStates>;
  task(id: string, index: number): Promise<ITask | null>;
  log(id: string, batch: number, offset: number, task?: number): Promise<ILogPart>;
  script(id: string): Promise<string>;
  act(id: string, action: JobAction, body?: object): Promise<IJob>;
  remove(id: string): Promise<void>;
}

export class HybridApi implements IApi {
  constructor(private readonly settings: ServerConnection.ISettings) {}

  async pools(): Promise<IPool[]> {
    return (await this.request<{ pools: IPool[] }>(['pools'])).pools;
  }

  jobs(query: IJobsQuery): Promise<IJobsPage> {
    const { state, ...rest } = query;
    return this.request(['jobs'], { ...rest, state: state?.join(',') });
  }

  job(id: string): Promise<IJobDetail> {
    return this.request(['jobs', id]);
  }

  taskStates(id: string): Promise<ITaskStates> {
    return this.request(['jobs', id, 'tasks']);
  }

  async task(id: string, index: number): Promise<ITask | null> {
    const found = await this.request<{ tasks: ITask[] }>(['jobs', id, 'tasks'], { index });
    return found.tasks[0] ?? null;
  }

  log(id: string, batch: number, offset: number, task?: number): Promise<ILogPart> {
    return this.request(['jobs', id, 'logs', String(batch)], { offset, task, limit: 65536 });
  }

  async script(id: string): Promise<string> {
    return (await this.request<{ script: string }>(['jobs', id, 'script'])).script;
  }

  async act(id: string, action: JobAction, body: object = {}): Promise<IJob> {
    const init = { method: 'POST', body: JSON.stringify(body) };
    return (await this.request<{ job: IJob }>(['jobs', id, action], {}, init)).job;
  }

  async remove(id: string): Promise<void> {
    await this.request(['jobs', id], {}, { method: 'DELETE' });
  }

  private async request<T>(
    path: string[],
    query: Record<string, string | number | undefined> = {},
    init: RequestInit = {}
  ): Promise<T> {
    const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== '');
    const parameters = new URLSearchParams(given.map(([key, value]) => [key, String(value)]));
    const url = URLExt.join(
      this.settings.baseUrl,
      'hybrid/api/v1',
      ...path.map(part => encodeURIComponent(part))
    );
    const target = given.length ? `${url}?${parameters}` : url;
    let response: Response;
    try {
      response = await ServerConnection.makeRequest(target, init, this.settings);
    } catch (error) {
      throw new RequestError(error instanceof Error ? error.message : String(error), 0);
    }
    const text = await response.text();
    let data: unknown = null;
    try {
      data = text ? JSON.parse(text) : null;
    } catch {
      // A proxy's page instead of the server's answer: the status tells.
    }
    if (!response.ok) {
      const said = (data ?? {}) as { message?: string; hint?: string };
      const words = said.message || `${response.status} ${response.statusText}`;
      throw new RequestError(words, response.status, said.hint ?? '');
    }
    return data as T;
  }
}
