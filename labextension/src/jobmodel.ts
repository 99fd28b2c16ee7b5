/** What the panel knows of the one job that is open: its details, its tasks and a log that follows. */

import { Signal } from '@lumino/signaling';

import type { IApi } from './api';
import type { IPlace } from './logmodel';
import { LogModel } from './logmodel';
import type { IJob, IJobDetail, ITask } from './types';
import { isFinal } from './types';

/** Milliseconds between two requests for the details while news come in. */
const APART = 1000;
/** Milliseconds between two looks at a job that runs: its files know of tasks that no event has told yet. */
const LOOK = 3000;
/** Batches whose logs are looked at for one in which something was written. */
const BATCHES = 10;

export class JobModel {
  constructor(
    private readonly api: IApi,
    readonly id: string,
    row: IJob | undefined
  ) {
    this.row = row ?? null;
    void this.refresh();
  }

  readonly changed = new Signal<this, void>(this);

  /** The newest that is known, in short. */
  row: IJob | null;
  detail: IJobDetail | null = null;
  /** One letter for each task of an array. */
  states = '';
  error = '';
  script: string | null = null;
  /** The task that is looked at. */
  index: number | null = null;
  task: ITask | null = null;
  log: LogModel | null = null;

  get isDisposed(): boolean {
    return this.disposed;
  }

  dispose(): void {
    this.disposed = true;
    clearTimeout(this.waiting);
    this.log?.dispose();
    Signal.clearData(this);
  }

  /** Take over a changed row; the details follow. */
  update(row: IJob): void {
    this.row = row;
    this.changed.emit();
    this.refreshSoon();
  }

  async refresh(): Promise<void> {
    try {
      const detail = await this.api.job(this.id);
      const states = detail.array ? (await this.api.taskStates(this.id)).states : '';
      if (this.disposed) {
        return;
      }
      this.detail = detail;
      if (!this.row || detail.seq >= this.row.seq) {
        this.row = detail;
      }
      this.states = states;
      this.error = '';
      if (this.index !== null) {
        await this.loadTask(this.index);
      }
      this.followLog();
    } catch (error) {
      this.error = error instanceof Error ? error.message : String(error);
    }
    if (!this.disposed) {
      this.changed.emit();
      if (this.row?.state === 'RUNNING') {
        this.refreshSoon(LOOK);
      }
    }
  }

  /** How many tasks there are of each kind, as the files say, which are ahead of the list. */
  get progress(): IJob | null {
    if (!this.row || !this.states || this.states.length !== this.row.tasks) {
      return this.row;
    }
    const count = (letter: string): number => this.states.split(letter).length - 1;
    return { ...this.row, done: count('d'), failed: count('f') + count('l'), running: count('r') };
  }

  /** What it has cost so far; an event knows it only of plain jobs, the details of all. */
  get cost(): number | null {
    return this.row?.cost ?? this.detail?.cost ?? null;
  }

  async loadScript(): Promise<void> {
    try {
      this.script = await this.api.script(this.id);
    } catch (error) {
      this.script = error instanceof Error ? error.message : String(error);
    }
    this.changed.emit();
  }

  /** Look at one task of an array, or at none. */
  async choose(index: number | null): Promise<void> {
    this.index = index;
    this.task = null;
    this.changed.emit();
    if (index !== null) {
      await this.loadTask(index).catch(error => {
        this.error = error instanceof Error ? error.message : String(error);
      });
    }
    this.followLog();
    this.changed.emit();
  }

  private async loadTask(index: number): Promise<void> {
    const task = await this.api.task(this.id, index);
    if (!this.disposed && this.index === index) {
      this.task = task;
    }
  }

  /** Ask for the details after a while, unless that is about to happen anyway. */
  private refreshSoon(delay = APART): void {
    const due = Date.now() + delay;
    if (this.waiting !== undefined && this.due <= due) {
      return;
    }
    clearTimeout(this.waiting);
    this.due = due;
    this.waiting = setTimeout(() => {
      this.waiting = undefined;
      void this.refresh();
    }, delay);
  }

  /**
   * Where the log is that is worth reading: what the task wrote that is looked at, else the latest batches. Why a task
   * failed or was lost that wrote nothing may stand in the log of its batch; no batch may have taken it.
   */
  private places(): IPlace[] {
    const batches = this.detail?.batches ?? [];
    const begun = batches.filter(each => each.state !== 'PENDING');
    const latest = (begun.length ? begun : batches)
      .slice(-BATCHES)
      .reverse()
      .map(({ batch }) => ({ batch }));
    if (this.index === null) {
      return latest;
    }
    const bad = 'fl'.includes(this.states[this.index]);
    const batch = this.task?.batch ?? null;
    if (batch === null) {
      return this.task && bad ? latest : [];
    }
    const own = { batch, task: this.index };
    return bad ? [own, { batch }] : [own];
  }

  private followLog(): void {
    if (this.disposed) {
      return;
    }
    const places = this.places();
    if (this.log && JSON.stringify(this.log.places) === JSON.stringify(places)) {
      if (this.row && !isFinal(this.row.state)) {
        this.log.wake();
      }
      return;
    }
    this.log?.dispose();
    this.log = places.length ? new LogModel(this.api, this.id, places) : null;
  }

  private disposed = false;
  private due = 0;
  private waiting: ReturnType<typeof setTimeout> | undefined;
}
