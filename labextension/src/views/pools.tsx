/** The pools: what is free, how long the queue is, what it costs, and which do not answer. */

import React from 'react';

import { bytes, moment } from '../format';
import { WarningIcon } from '../icons';
import type { IPool } from '../types';
import { useSignal, useView } from './context';
import { Section } from './jobdetail';
import { PoolsAbsent } from './placeholders';

function Pool(props: { pool: IPool }): JSX.Element {
  const { model, trans } = useView();
  const { pool } = props;
  const away = pool.reachable === false;
  const chosen = model.filter.pool === pool.name;
  const facts: string[] = [];
  if (pool.gpus_total) {
    facts.push(trans.__('%1/%2 gpus free', pool.gpus_free ?? '?', pool.gpus_total));
  }
  if (pool.memory_total) {
    const total = bytes(pool.memory_total, trans);
    facts.push(
      pool.memory_free === null
        ? trans.__('%1 memory', total)
        : trans.__('%1 of %2 memory free', bytes(pool.memory_free, trans), total)
    );
  }
  if (pool.queued !== null) {
    facts.push(trans.__('%1 queued', pool.queued));
  }
  if (pool.active) {
    facts.push(trans._n('%1 job of yours', '%1 jobs of yours', pool.active));
  }
  if (pool.price_cpu_hour) {
    facts.push(trans.__('%1 per cpu hour', String(pool.price_cpu_hour)));
  }
  if (pool.price_gpu_hour) {
    facts.push(trans.__('%1 per gpu hour', String(pool.price_gpu_hour)));
  }
  const known = pool.cpus_total !== null && pool.cpus_free !== null;
  if (!facts.length && !known) {
    facts.push(trans.__('not asked yet'));
  }
  if (pool.default) {
    facts.unshift(trans.__('default pool'));
  }
  const used = known ? (pool.cpus_total! - pool.cpus_free!) / Math.max(1, pool.cpus_total!) : 0;
  return (
    <li className="jp-Hybrid-pool">
      <button
        className="jp-Hybrid-poolButton"
        aria-pressed={chosen}
        title={
          chosen
            ? trans.__('Show the jobs of all pools')
            : trans.__('Show only the jobs of this pool')
        }
        onClick={() => model.setFilter({ pool: chosen ? '' : pool.name })}
      >
        <span className="jp-Hybrid-poolHead">
          <span className="jp-Hybrid-name">{pool.name}</span>
          {pool.kind !== pool.name && <span className="jp-Hybrid-tag">{pool.kind}</span>}
          <span className="jp-Hybrid-poolFree">
            {known ? trans.__('%1/%2 cpus free', pool.cpus_free!, pool.cpus_total!) : ''}
          </span>
        </span>
        {known && !away && (
          <span className="jp-Hybrid-bar" aria-hidden="true">
            <span className="jp-Hybrid-bar-running" style={{ width: `${100 * used}%` }} />
          </span>
        )}
        {away ? (
          <span className="jp-Hybrid-warning jp-Hybrid-clamp" title={pool.error}>
            <WarningIcon />{' '}
            {pool.unreachable_since
              ? trans.__('does not answer since %1', moment(pool.unreachable_since))
              : trans.__('does not answer')}
            {pool.error && <span className="jp-Hybrid-muted"> {pool.error}</span>}
          </span>
        ) : (
          <span className="jp-Hybrid-muted">{facts.join(' · ')}</span>
        )}
      </button>
    </li>
  );
}

export function Pools(): JSX.Element | null {
  const { model, trans } = useView();
  useSignal(model.changed);
  const { pools, connection } = model;
  if (!pools.length && !['loading', 'live', 'error'].includes(connection)) {
    return null; // the banner says why
  }
  return (
    <Section title={trans.__('Pools')}>
      {pools.length ? (
        <ul className="jp-Hybrid-pools" aria-label={trans.__('Pools')}>
          {pools.map(pool => (
            <Pool key={pool.name} pool={pool} />
          ))}
        </ul>
      ) : (
        <PoolsAbsent />
      )}
    </Section>
  );
}
