import { Signal } from '@lumino/signaling';

import type { IApi, IJobsQuery, JobAction } from '../api';
import { RequestError } from '../api';
import type { IEvent } from '../model';
import { HybridModel, JOBS_SCHEMA, POOLS_SCHEMA } from '../model';
import type { IJob, IJobDetail, IJobsPage, ILogPart, IPool, ITask, JobState } from '../types';

function job(id: string, values: Partial<IJob> = {}): IJob {
  return {
    id,
    seq: 1,
    name: id,
    pool: 'desk',
    kind: 'function',
    state: 'RUNNING',
    cause: null,
    reason: '',
    advice: '',
    array: false,
    tasks: 1,
    done: 0,
    failed: 0,
    running: 1,
    created: 100,
    started: 101,
    ended: null,
    native_id: '',
    notebook: '',
    notebook_browser: null,
    cell: null,
    function: '',
    held: false,
    cpus: 1,
    memory: null,
    time: null,
    cpu_seconds: null,
    peak_memory: null,
    cost: null,
    ...values
  };
}

/** A server in memory: rows with numbers of changes, pages, what was removed, and a switch to turn it off. */
class Server implements IApi {
  rows = new Map<string, IJob>();
  removedAt: [number, string][] = [];
  seq = 0;
  down: RequestError | null = null;
  asked: IJobsQuery[] = [];
  reset = false;
  logText = '';
  detailAsked = 0;
  /** What the details have beyond the row. */
  details: Partial<IJobDetail> = {};
  /** What a task wrote, if that is not all of the log; and the batch that it was in. */
  taskLog: string | null = null;
  taskBatch: number | null = 3;
  /** Batches that wrote nothing. */
  silent: number[] = [];

  set(id: string, values: Partial<IJob> = {}): IJob {
    const row = { ...(this.rows.get(id) ?? job(id)), ...values, seq: ++this.seq };
    this.rows.set(id, row);
    return row;
  }

  private answer(): void {
    if (this.down) {
      throw this.down;
    }
  }

  async pools(): Promise<IPool[]> {
    this.answer();
    return [{ name: 'desk', kind: 'local' } as IPool];
  }

  async jobs(query: IJobsQuery): Promise<IJobsPage> {
    this.asked.push(query);
    this.answer();
    const all = [...this.rows.values()];
    const base = { total: all.length, counts: {}, seq: this.seq };
    if (query.since !== undefined) {
      const since = query.since;
      const removed = this.removedAt.filter(([seq]) => seq > since).map(([, id]) => id);
      const jobs = all.filter(row => row.seq > since);
      return { ...base, jobs, next: null, removed, reset: this.reset };
    }
    const rows = all
      .filter(
        row =>
          (!query.state?.length || query.state.includes(row.state)) &&
          row.name.includes(query.name ?? '')
      )
      .sort((a, b) => b.created - a.created);
    const first = Number(query.cursor ?? 0);
    const last = first + (query.limit ?? 100);
    return { ...base, jobs: rows.slice(first, last), next: last < rows.length ? `${last}` : null };
  }

  async job(id: string): Promise<IJobDetail> {
    this.detailAsked += 1;
    this.answer();
    const row = this.rows.get(id);
    if (!row) {
      throw new RequestError(`no job ${id}`, 404);
    }
    const batches = [{ batch: 3, state: row.state, host: '', native_id: '' }];
    return { ...row, batches, failures: [], ...this.details } as unknown as IJobDetail;
  }

  async taskStates(): Promise<{ total: number; states: string }> {
    return { total: 3, states: 'dfw' };
  }

  async task(_: string, index: number): Promise<ITask> {
    return {
      index,
      state: 'FAILED',
      cause: null,
      reason: 'why',
      seconds: 1,
      batch: this.taskBatch
    };
  }

  async log(_id: string, batch: number, offset: number, task?: number): Promise<ILogPart> {
    this.answer();
    const all = this.silent.includes(batch) ? '' : this.logText;
    const text = task === undefined ? all : (this.taskLog ?? all);
    const size = text.length;
    const start = offset < 0 ? Math.max(0, size + offset) : offset;
    const end = [...this.rows.values()].every(row => row.state !== 'RUNNING');
    return { text: text.slice(start), offset: start, next: size, size, end };
  }

  async script(): Promise<string> {
    return '#!/bin/sh';
  }

  async act(id: string, action: JobAction): Promise<IJob> {
    this.answer();
    return this.set(id, { state: action === 'cancel' ? 'CANCELLED' : 'PENDING' });
  }

  async remove(id: string): Promise<void> {
    this.rows.delete(id);
    this.removedAt.push([++this.seq, id]);
  }
}

class Events extends Signal<object, IEvent> {
  /** Tell what has changed since `since`, as the server does. */
  tell(server: Server, since: number, more = false): void {
    const jobs = [...server.rows.values()].filter(row => row.seq > since);
    this.emit({ schema_id: JOBS_SCHEMA, seq: server.seq, since, jobs, removed: [], more });
  }
}

async function until(what: () => boolean): Promise<void> {
  const deadline = Date.now() + 20_000;
  while (!what()) {
    if (Date.now() > deadline) {
      throw new Error(`never: ${what}`);
    }
    await new Promise(resolve => setTimeout(resolve, 5));
  }
}

describe('HybridModel', () => {
  let server: Server;
  let events: Events;
  let model: HybridModel;
  let ended: [string, JobState][];

  const begin = async (refresh = 3600): Promise<void> => {
    events = new Events({});
    model = new HybridModel(server, events as never, { refresh });
    ended = [];
    model.ended.connect((_, row) => ended.push([row.id, row.state]));
    await until(() => !model.loading);
  };
  const ids = (): string[] => model.jobs.map(row => row.id);

  beforeEach(() => {
    server = new Server();
  });
  afterEach(() => model.dispose());

  it('begins with pools and the newest jobs', async () => {
    server.set('a', { created: 1 });
    server.set('b', { created: 2 });
    await begin();
    await until(() => model.connection === 'live');
    expect(ids()).toEqual(['b', 'a']);
    expect(model.pools.map(pool => pool.name)).toEqual(['desk']);
    expect(model.total).toBe(2);
  });

  it('follows events: changed, new and removed jobs', async () => {
    server.set('a', { created: 1 });
    await begin();
    await until(() => model.connection === 'live');
    let since = server.seq;
    server.set('a', { state: 'COMPLETED' });
    server.set('b', { created: 2 });
    events.tell(server, since);
    expect(ids()).toEqual(['b', 'a']);
    expect(model.find('a')?.state).toBe('COMPLETED');
    expect(ended).toEqual([['a', 'COMPLETED']]);
    since = server.seq;
    await server.remove('a');
    events.emit({ schema_id: JOBS_SCHEMA, seq: server.seq, since, jobs: [], removed: ['a'] });
    expect(ids()).toEqual(['b']);
    events.emit({ schema_id: POOLS_SCHEMA, pools: [] });
    expect(model.pools).toEqual([]);
    expect(server.asked).toHaveLength(1); // nothing was asked for that the events told
  });

  it('asks for what an event left out or a lost one had told', async () => {
    server.set('a', { created: 1 });
    await begin();
    await until(() => model.connection === 'live');
    server.set('b', { created: 2 });
    const since = server.seq; // its message never came
    server.set('c', { created: 3 });
    events.tell(server, since);
    await until(() => ids().join() === 'c,b,a');
    const before = server.seq;
    server.set('d', { created: 4 });
    events.emit({ schema_id: JOBS_SCHEMA, seq: server.seq, since: before, jobs: [], more: true });
    await until(() => ids().join() === 'd,c,b,a');
    expect(
      server.asked.filter(query => query.since !== undefined).map(query => query.since)
    ).toEqual([1, 3]);
  });

  it('does not go back to an older row', async () => {
    const old = server.set('a');
    await begin();
    await until(() => model.connection === 'live');
    await model.act('a', 'cancel');
    expect(model.find('a')?.state).toBe('CANCELLED');
    events.emit({ schema_id: JOBS_SCHEMA, seq: server.seq, since: 1, jobs: [old] });
    expect(model.find('a')?.state).toBe('CANCELLED');
  });

  it('tells that the server is gone, and catches up when it is back', async () => {
    server.set('a', { created: 1 });
    await begin(0.05);
    await until(() => model.connection === 'live');
    server.down = new RequestError('connection refused', 0);
    await until(() => model.connection === 'gone');
    expect(model.error).toBe('connection refused');
    expect(ids()).toEqual(['a']); // what was known stays in view
    server.set('a', { state: 'FAILED' });
    server.set('b', { created: 2 });
    server.down = null;
    await model.reload();
    await until(() => model.connection === 'live');
    expect(ids()).toEqual(['b', 'a']);
    expect(ended).toEqual([['a', 'FAILED']]);
  });

  it.each([
    [404, 'missing'],
    [403, 'refused'],
    [503, 'gone'],
    [500, 'error']
  ])('tells apart why nothing comes: %i is %s', async (status, connection) => {
    server.down = new RequestError('words', status, 'hint');
    await begin();
    expect([model.connection, model.error, model.hint]).toEqual([connection, 'words', 'hint']);
  });

  it('loads the list anew where the index was made anew', async () => {
    server.set('a');
    server.set('a');
    await begin(0.05);
    await until(() => model.connection === 'live');
    server.rows.clear();
    server.seq = 0;
    server.set('z');
    server.reset = true;
    await until(() => ids().join() === 'z');
  });

  it('pages, without a job twice', async () => {
    for (let index = 0; index < 450; index++) {
      server.set(`j${index}`, { created: index, state: 'COMPLETED' });
    }
    await begin();
    await until(() => model.connection === 'live');
    expect([model.jobs.length, model.total, model.hasMore]).toEqual([200, 450, true]);
    await Promise.all([model.loadMore(), model.loadMore()]);
    await model.loadMore();
    await model.loadMore();
    expect(new Set(ids()).size).toBe(450);
    expect([model.jobs.length, model.hasMore]).toEqual([450, false]);
  });

  it('keeps an old job that changes off the pages that are loaded', async () => {
    for (let index = 0; index < 300; index++) {
      server.set(`j${index}`, { created: index });
    }
    await begin();
    await until(() => model.connection === 'live');
    const since = server.seq;
    server.set('j5', { state: 'COMPLETED' });
    events.tell(server, since);
    expect(model.find('j5')).toBeUndefined();
    expect(model.jobs).toHaveLength(200);
  });

  it('filters, and drops what no longer matches', async () => {
    server.set('a', { state: 'RUNNING' });
    server.set('b', { state: 'COMPLETED' });
    await begin();
    await until(() => model.connection === 'live');
    model.setFilter({ state: ['RUNNING'] });
    await until(() => ids().join() === 'a');
    const since = server.seq;
    server.set('a', { state: 'COMPLETED' });
    server.set('c', { state: 'COMPLETED' });
    events.tell(server, since);
    expect(ids()).toEqual([]);
    expect(ended).toEqual([['a', 'COMPLETED']]);
  });

  it('an answer to an earlier filter does not win over a later one', async () => {
    server.set('a', { state: 'RUNNING' });
    server.set('b', { state: 'COMPLETED' });
    await begin();
    const jobs = server.jobs.bind(server);
    let release: () => void = () => undefined;
    server.jobs = async query => {
      const page = await jobs(query);
      if (query.state?.includes('RUNNING')) {
        await new Promise<void>(resolve => (release = resolve));
      }
      return page;
    };
    model.setFilter({ state: ['RUNNING'] });
    await until(() => server.asked.some(query => query.state?.includes('RUNNING')));
    model.setFilter({ state: ['COMPLETED'] });
    await until(() => ids().join() === 'b' && !model.loading);
    release();
    await new Promise(resolve => setTimeout(resolve, 20));
    expect(ids()).toEqual(['b']);
  });

  it('follows the job that is open, with its log', async () => {
    server.set('a');
    server.logText = 'one\n';
    await begin();
    await until(() => model.connection === 'live');
    model.select('a');
    const open = model.selected!;
    await until(() => open.log?.text === 'one\n');
    expect(open.log?.place).toEqual({ batch: 3 });
    const since = server.seq;
    server.logText += 'two\n';
    server.set('a', { state: 'COMPLETED' });
    events.tell(server, since);
    expect(open.row?.state).toBe('COMPLETED'); // at once, before the details are asked for
    await until(() => open.detail?.state === 'COMPLETED' && open.log?.text === 'one\ntwo\n');
    await until(() => open.log!.end);
    model.select(null);
    expect(open.isDisposed).toBe(true);
  });

  it('looks at a job that runs without being told, and counts its tasks by its files', async () => {
    server.set('a', { array: true, tasks: 3, done: 0 });
    await begin();
    model.select('a');
    const open = model.selected!;
    await until(() => open.states === 'dfw');
    expect(open.progress).toMatchObject({ done: 1, failed: 1, running: 0 });
    server.taskStates = async () => ({ total: 3, states: 'ddr' });
    await until(() => open.states === 'ddr');
    expect(open.progress).toMatchObject({ done: 2, failed: 0, running: 1 });
  });

  it('shows of an array the latest log in which something is written', async () => {
    server.set('a', { array: true, tasks: 3 });
    server.logText = 'loading\n';
    const batch = (number: number, state: JobState): IJobDetail['batches'][number] => ({
      batch: number,
      state,
      host: '',
      native_id: ''
    });
    server.details.batches = [batch(0, 'COMPLETED'), batch(1, 'RUNNING'), batch(2, 'PENDING')];
    await begin();
    model.select('a');
    const open = model.selected!;
    await until(() => open.log?.text === 'loading\n');
    expect(open.log!.place).toEqual({ batch: 1 });
    await open.choose(1);
    expect(open.log!.place).toEqual({ batch: 3, task: 1 });
    server.silent = [1];
    await open.choose(null); // batch 1 may still write something
    expect(open.log!.place).toEqual({ batch: 1 });
    server.set('a', { state: 'FAILED' });
    await until(() => open.log!.place.batch === 0 && open.log!.text === 'loading\n');
  });

  it('shows the log of the batch for a failed task that has written nothing, for no other', async () => {
    server.set('a', { array: true, tasks: 3, state: 'FAILED' });
    server.logText = 'no python here\n';
    server.taskLog = '';
    await begin();
    model.select('a');
    const open = model.selected!;
    await until(() => open.states === 'dfw');
    await open.choose(1); // failed
    await until(() => open.log?.text === 'no python here\n');
    expect(open.log!.place).toEqual({ batch: 3 });
    await open.choose(0); // done
    await until(() => open.log!.end);
    expect([open.log!.text, open.log!.place]).toEqual(['', { batch: 3, task: 0 }]);
    server.taskBatch = null;
    await open.choose(2); // waiting
    expect(open.log).toBeNull();
    server.taskStates = async () => ({ total: 3, states: 'dfl' });
    await open.refresh(); // lost, before a batch took it
    await until(() => open.log?.text === 'no python here\n');
    expect(open.log!.place).toEqual({ batch: 3 });
  });

  it('keeps the cost that only the details tell while events bring rows without it', async () => {
    server.set('a', { array: true, tasks: 3 });
    server.details.cost = 1.5;
    await begin();
    await until(() => model.connection === 'live');
    model.select('a');
    const open = model.selected!;
    await until(() => open.detail !== null);
    const since = server.seq;
    server.set('a', { done: 1 });
    events.tell(server, since);
    expect(open.row?.cost).toBeNull();
    expect(open.cost).toBe(1.5);
  });

  it('shows a task of an array with its own log, and says what is wrong with a job that is gone', async () => {
    server.set('a', { array: true, tasks: 3 });
    await begin();
    model.select('a');
    const open = model.selected!;
    await until(() => open.states === 'dfw');
    await open.choose(1);
    expect(open.task?.reason).toBe('why');
    expect(open.log?.place.task).toBe(1);
    model.select('nowhere');
    await until(() => model.selected?.error === 'no job nowhere');
  });
});
