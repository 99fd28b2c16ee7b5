/** What is shown where there is nothing to show: each says why, and the next step. */

import { Button } from '@jupyterlab/ui-components';
import React from 'react';

import { moment } from '../format';
import { WarningIcon } from '../icons';
import { useSignal, useView } from './context';

/** One banner for all that is wrong with the server; nothing while it is well. */
export function Banner(): JSX.Element | null {
  const { model, trans } = useView();
  useSignal(model.changed);
  if (model.connection === 'live' || model.connection === 'loading') {
    return null;
  }
  const since = model.heard ? trans.__('Last heard of at %1.', moment(model.heard / 1000)) : '';
  const said = {
    gone: {
      head: trans.__('The Jupyter server does not answer'),
      body: trans.__(
        'Jobs go on where they run. %1 The panel asks again by itself and catches up.',
        since
      )
    },
    missing: {
      head: trans.__('The server extension is not there'),
      body: trans.__(
        'Enable it with "jupyter server extension enable jupyter_hybrid" and start the Jupyter server again.'
      )
    },
    refused: {
      head: trans.__('The server refuses to show jobs'),
      body: trans.__('Log in again, or ask the operator of this Jupyter for access.')
    },
    error: {
      head: trans.__('The server answered with an error'),
      body: [model.error, model.hint].filter(Boolean).join('\n')
    }
  }[model.connection];
  return (
    <div className="jp-Hybrid-banner" role="alert">
      <strong>
        <WarningIcon /> {said.head}
      </strong>
      <div>{said.body}</div>
      <Button small className="jp-Hybrid-button" onClick={() => void model.reload()}>
        {trans.__('Try now')}
      </Button>
    </div>
  );
}

/** Grey lines where rows will be. */
export function Loading(props: { label: string; lines?: number }): JSX.Element {
  return (
    <div className="jp-Hybrid-loading" role="status" aria-label={props.label}>
      {Array.from({ length: props.lines ?? 4 }, (_, index) => (
        <div key={index} className="jp-Hybrid-ghost" />
      ))}
    </div>
  );
}

function Empty(props: { head: string; children?: React.ReactNode }): JSX.Element {
  return (
    <div className="jp-Hybrid-empty">
      <strong>{props.head}</strong>
      {props.children}
    </div>
  );
}

/** Why there are no jobs in the list. */
export function JobsAbsent(): JSX.Element | null {
  const { model, trans, commands } = useView();
  if (model.loading) {
    return <Loading label={trans.__('Jobs are being loaded')} lines={6} />;
  }
  if (model.connection !== 'live') {
    return null; // the banner says it
  }
  if (model.filtered) {
    return (
      <Empty head={trans.__('No job matches')}>
        <Button
          small
          className="jp-Hybrid-button"
          onClick={() => model.setFilter({ state: [], pool: '', name: '' })}
        >
          {trans.__('Show all jobs')}
        </Button>
      </Empty>
    );
  }
  const pool = model.pools.find(each => each.default) ?? model.pools[0];
  return (
    <Empty head={trans.__('No jobs yet')}>
      <p>{trans.__('Put one line on top of a notebook cell and run it:')}</p>
      <pre>{`%load_ext jupyter_hybrid\n\n%%${pool?.kind ?? 'local'} --cpus 1\nprint("hello")`}</pre>
      <p>{trans.__('or choose a pool in the toolbar of a notebook, at "Run on".')}</p>
      <Button
        small
        className="jp-Hybrid-button jp-mod-accept"
        onClick={() => void commands.execute('notebook:create-new')}
      >
        {trans.__('New notebook')}
      </Button>
    </Empty>
  );
}

const POOL_EXAMPLE = 'pools:\n  hpc:\n    kind: slurm';

/** What to do where no pool is known, which is so while the configuration is wrong. */
export function PoolsAbsent(): JSX.Element {
  const { model, trans } = useView();
  if (model.connection === 'loading') {
    return <Loading label={trans.__('Pools are being loaded')} lines={2} />;
  }
  return (
    <Empty head={trans.__('No pools to show')}>
      <p>
        {trans.__(
          'A pool is a place that runs jobs. Describe one in hybrid.yaml, in the project folder or in the Jupyter configuration folder:'
        )}
      </p>
      <pre>{POOL_EXAMPLE}</pre>
      <p>{trans.__('"jupyter hybrid doctor" checks it.')}</p>
    </Empty>
  );
}
