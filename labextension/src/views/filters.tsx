/** What narrows the list of jobs: a name, a pool, and states with how many jobs are in each. */

import { HTMLSelect, InputGroup } from '@jupyterlab/ui-components';
import React, { useEffect, useState } from 'react';

import { StateIcon } from '../icons';
import { STATES } from '../types';
import { stateWord } from '../words';
import { useSignal, useView } from './context';

/** Milliseconds without a key before the list follows. */
const PAUSE = 250;

export function Filters(): JSX.Element {
  const { model, trans } = useView();
  useSignal(model.changed);
  const [name, setName] = useState(model.filter.name);
  useEffect(() => setName(model.filter.name), [model.filter.name]);
  useEffect(() => {
    if (name === model.filter.name) {
      return undefined;
    }
    const timer = window.setTimeout(() => model.setFilter({ name }), PAUSE);
    return () => window.clearTimeout(timer);
  }, [name, model]);

  const { state } = model.filter;
  const present = STATES.filter(each => model.counts[each] || state.includes(each));
  return (
    <div className="jp-Hybrid-filters" role="search" aria-label={trans.__('Filter jobs')}>
      <div className="jp-Hybrid-filterRow">
        <InputGroup
          type="search"
          className="jp-Hybrid-input"
          placeholder={trans.__('Filter by name')}
          aria-label={trans.__('Filter by name')}
          value={name}
          onChange={event => setName(event.target.value)}
        />
        {model.pools.length > 1 && (
          <HTMLSelect
            className="jp-Hybrid-select"
            aria-label={trans.__('Pool')}
            value={model.filter.pool}
            onChange={event => model.setFilter({ pool: event.target.value })}
          >
            <option value="">{trans.__('all pools')}</option>
            {model.pools.map(pool => (
              <option key={pool.name} value={pool.name}>
                {pool.name}
              </option>
            ))}
          </HTMLSelect>
        )}
      </div>
      {present.length > 0 && (
        <div className="jp-Hybrid-chips" role="group" aria-label={trans.__('States')}>
          {present.map(each => {
            const on = state.includes(each);
            return (
              <button
                key={each}
                className="jp-Hybrid-chip"
                aria-pressed={on}
                onClick={() =>
                  model.setFilter({
                    state: on ? state.filter(one => one !== each) : [...state, each]
                  })
                }
              >
                <StateIcon state={each} />
                {stateWord(each, false, trans)}
                {model.counts[each] !== undefined && ` ${model.counts[each]!.toLocaleString()}`}
              </button>
            );
          })}
        </div>
      )}
    </div>
  );
}
