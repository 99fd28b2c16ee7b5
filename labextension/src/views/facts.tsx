/** What a job asked for, beside what it used of it, and what it costs. */

import React from 'react';

import { bytes, duration, elapsed, money, percent } from '../format';
import type { IJob, IJobDetail } from '../types';
import { isFinal } from '../types';
import { resourceWord } from '../words';
import { useNow, useView } from './context';

interface ILine {
  name: string;
  asked: string;
  used: string;
  share: number | null;
}

function Meter(props: { share: number; label: string }): JSX.Element {
  const share = Math.max(0, Math.min(1, props.share));
  return (
    <div
      className="jp-Hybrid-meter"
      role="meter"
      aria-label={props.label}
      aria-valuemin={0}
      aria-valuemax={100}
      aria-valuenow={Math.round(100 * share)}
    >
      <div style={{ width: `${100 * share}%` }} />
    </div>
  );
}

/** Resources with rows of their own; the others are only asked for. */
const MEASURED = new Set(['cpus', 'memory', 'time']);
/** What goes without saying. */
const PLAIN: Record<string, unknown> = { nodes: 1, tasks_per_node: 1 };

function text(value: unknown): string {
  return typeof value === 'object' && value !== null
    ? Object.entries(value)
        .map(([key, each]) => (each === null ? key : `${key}=${String(each)}`))
        .join(', ')
    : String(value);
}

export function Facts(props: { job: IJobDetail; row: IJob; cost: number | null }): JSX.Element {
  const { trans } = useView();
  const { job, row, cost } = props;
  const now = useNow(!isFinal(row.state));
  const span = elapsed(row, now);
  const { used } = job;
  const lines: ILine[] = [
    {
      name: trans.__('CPUs'),
      asked: String(row.cpus),
      used:
        used.cpu_seconds === null
          ? ''
          : trans.__('%1 of cpu time', duration(used.cpu_seconds, trans)),
      share: used.cpu_efficiency
    },
    {
      name: trans.__('Memory'),
      asked: row.memory ? bytes(row.memory, trans) : '',
      used: used.peak_memory ? trans.__('%1 at most', bytes(used.peak_memory, trans)) : '',
      share: used.memory_efficiency
    },
    {
      name: trans.__('Time'),
      asked: row.time ? duration(row.time, trans) : '',
      used: span === null ? '' : duration(span, trans),
      share: row.time && span !== null && !row.array ? span / row.time : null
    }
  ];
  const others = Object.entries(job.resources).filter(
    ([name, value]) =>
      !MEASURED.has(name) &&
      value !== null &&
      value !== 0 &&
      value !== PLAIN[name] &&
      text(value) !== ''
  );
  return (
    <>
      <table className="jp-Hybrid-table">
        <thead>
          <tr>
            <td />
            <th scope="col">{trans.__('asked')}</th>
            <th scope="col">{trans.__('used')}</th>
          </tr>
        </thead>
        <tbody>
          {lines
            .filter(line => line.asked || line.used)
            .map(line => (
              <tr key={line.name}>
                <th scope="row">{line.name}</th>
                <td>{line.asked || '–'}</td>
                <td>
                  {line.used || '–'}
                  {line.share !== null && line.used && (
                    <>
                      <span className="jp-Hybrid-muted"> {percent(line.share, trans)}</span>
                      <Meter
                        share={line.share}
                        label={trans.__('%1: used of what was asked', line.name)}
                      />
                    </>
                  )}
                </td>
              </tr>
            ))}
        </tbody>
      </table>
      <dl className="jp-Hybrid-facts">
        {cost !== null && (
          <>
            <dt>{isFinal(row.state) ? trans.__('Cost') : trans.__('Cost so far')}</dt>
            <dd>{money(cost)}</dd>
          </>
        )}
        {others.map(([name, value]) => (
          <React.Fragment key={name}>
            <dt>{resourceWord(name, trans)}</dt>
            <dd>{text(value)}</dd>
          </React.Fragment>
        ))}
      </dl>
    </>
  );
}
