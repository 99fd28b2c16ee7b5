/** How far an array has come: done, failed and running tasks in one bar. */

import React from 'react';

import type { IJob } from '../types';
import { isFinal } from '../types';
import { useView } from './context';

export function Progress(props: { job: IJob; small?: boolean }): JSX.Element {
  const { trans } = useView();
  const { job, small } = props;
  const running = isFinal(job.state) ? 0 : job.running;
  const share = (count: number): string => `${(100 * count) / Math.max(1, job.tasks)}%`;
  const words = [trans.__('%1 of %2 done', job.done, job.tasks)];
  if (job.failed) {
    words.push(trans.__('%1 failed', job.failed));
  }
  if (running) {
    words.push(trans.__('%1 running', running));
  }
  const bar = (
    <div className="jp-Hybrid-bar" aria-hidden="true">
      <div className="jp-Hybrid-bar-done" style={{ width: share(job.done) }} />
      <div className="jp-Hybrid-bar-failed" style={{ width: share(job.failed) }} />
      <div className="jp-Hybrid-bar-running" style={{ width: share(running) }} />
    </div>
  );
  if (small) {
    return bar;
  }
  return (
    <div
      role="progressbar"
      aria-label={trans.__('Tasks done')}
      aria-valuemin={0}
      aria-valuemax={job.tasks}
      aria-valuenow={job.done}
      aria-valuetext={words.join(', ')}
    >
      {bar}
      <div className="jp-Hybrid-muted">{words.join(' · ')}</div>
    </div>
  );
}
