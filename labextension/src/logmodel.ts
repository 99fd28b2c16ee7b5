/** The end of a log, which follows what is written. */

import { Signal } from '@lumino/signaling';

import type { IApi } from './api';

/** Milliseconds between two looks at a log that still grows. */
const APART = 1000;
const PART = 65536;
/** Characters that are kept; what is before them is on disk. */
const MOST = 4 * PART;

/** The log of a batch, or what one task wrote there. */
export interface IPlace {
  batch: number;
  task?: number;
}

export class LogModel {
  constructor(
    private readonly api: IApi,
    readonly job: string,
    /** Where to look: at the next place if nothing was written at one, and nothing will be. */
    readonly places: readonly IPlace[]
  ) {
    void this.more();
  }

  readonly changed = new Signal<this, void>(this);
  text = '';
  /** Whether the beginning is not shown. */
  cut = false;
  loading = true;
  /** Whether nothing more will come. */
  end = false;
  error = '';

  /** Whose log this is. */
  get place(): IPlace {
    return this.places[this.at];
  }

  dispose(): void {
    this.disposed = true;
    clearTimeout(this.waiting);
    Signal.clearData(this);
  }

  /** The job runs, perhaps again: there may be more. */
  wake(): void {
    if (this.end && !this.disposed) {
      this.end = false;
      void this.more();
    }
  }

  private async more(): Promise<void> {
    try {
      const { batch, task } = this.place;
      const part = await this.api.log(this.job, batch, this.next ?? -PART, task);
      if (this.disposed) {
        return;
      }
      if (part.end && part.size === 0 && this.at < this.places.length - 1) {
        this.at += 1;
        this.next = null;
        void this.more();
        return;
      }
      this.cut ||= this.next === null && part.offset > 0;
      if (part.text) {
        const text = this.text + part.text;
        this.cut ||= text.length > MOST;
        this.text = text.slice(-MOST);
      }
      this.next = part.next;
      this.error = '';
      this.end = part.end && part.next >= part.size;
      this.loading = false;
      this.changed.emit();
      if (part.next < part.size) {
        void this.more();
        return;
      }
    } catch (error) {
      this.error = error instanceof Error ? error.message : String(error);
      this.loading = false;
      this.changed.emit();
    }
    if (!this.end && !this.disposed) {
      this.waiting = setTimeout(() => void this.more(), APART);
    }
  }

  private at = 0;
  private next: number | null = null;
  private disposed = false;
  private waiting: ReturnType<typeof setTimeout> | undefined;
}

// eslint-disable-next-line no-control-regex
const ANSI = /\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07/g;

/** Return what a terminal would have in its lines: without colours, and with what progress bars overwrote gone. */
export function plain(text: string): string {
  const clean = text.replace(ANSI, '');
  if (!clean.includes('\r')) {
    return clean;
  }
  return clean
    .replace(/\r+\n/g, '\n')
    .split('\n')
    .map(line => line.slice(line.replace(/\r+$/, '').lastIndexOf('\r') + 1).replace(/\r+$/, ''))
    .join('\n');
}
