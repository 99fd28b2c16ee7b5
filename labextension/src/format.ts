/** Times, sizes and shares as people read them. */

import type { TranslationBundle } from '@jupyterlab/translation';

/** Return a span of seconds in its two largest units: `1 h 5 min`. */
export function duration(seconds: number, trans: TranslationBundle): string {
  const whole = Math.max(0, Math.round(seconds));
  const units: [number, (count: number) => string][] = [
    [86400, count => trans.__('%1 d', count)],
    [3600, count => trans.__('%1 h', count)],
    [60, count => trans.__('%1 min', count)],
    [1, count => trans.__('%1 s', count)]
  ];
  if (whole < 60) {
    return trans.__('%1 s', whole);
  }
  const first = units.findIndex(([size]) => whole >= size);
  const [size, large] = units[first];
  const [below, small] = units[first + 1];
  const rest = Math.floor((whole % size) / below);
  return large(Math.floor(whole / size)) + (rest ? ` ${small(rest)}` : '');
}

/** Return a number of bytes in the unit that suits it: `3.5 GB`. */
export function bytes(size: number, trans: TranslationBundle): string {
  const step = size < 1024 ? 0 : Math.min(5, Math.floor(Math.log2(size) / 10));
  const value = size / 1024 ** step;
  const number =
    value >= 100 || step === 0 || value % 1 < 0.05 ? Math.round(value) : value.toFixed(1);
  return [
    trans.__('%1 B', number),
    trans.__('%1 kB', number),
    trans.__('%1 MB', number),
    trans.__('%1 GB', number),
    trans.__('%1 TB', number),
    trans.__('%1 PB', number)
  ][step];
}

export function percent(share: number, trans: TranslationBundle): string {
  return trans.__('%1 %', Math.round(share * 100));
}

/** Return an amount of money; a small one is told from nothing. */
export function money(amount: number): string {
  return amount > 0 && amount < 0.005 ? '< 0.01' : amount.toFixed(2);
}

/** Return a moment: the time today, else the day too. */
export function moment(seconds: number, now: Date = new Date()): string {
  const date = new Date(seconds * 1000);
  const clock = date.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' });
  if (date.toDateString() === now.toDateString()) {
    return clock;
  }
  const sameYear = date.getFullYear() === now.getFullYear();
  const day = date.toLocaleDateString([], {
    day: 'numeric',
    month: 'short',
    year: sameYear ? undefined : 'numeric'
  });
  return `${day}, ${clock}`;
}

/** Return how long a job has run, or ran, in seconds; null before its start. */
export function elapsed(
  job: { started: number | null; ended: number | null },
  now: number
): number | null {
  return job.started === null ? null : Math.max(0, (job.ended ?? now) - job.started);
}
