/** The panel as a whole: pools, filters and jobs; a chosen job takes their place, or stands beside them where it is wide. */

import React, { useRef } from 'react';

import { useSignal, useSize, useView } from './context';
import { Filters } from './filters';
import { JobDetail } from './jobdetail';
import { JobList } from './joblist';
import { Banner } from './placeholders';
import { Pools } from './pools';

/** Pixels from which the list and a job stand side by side. */
const WIDE = 640;

export function PanelView(): JSX.Element {
  const { model, trans } = useView();
  useSignal(model.changed);
  const box = useRef<HTMLDivElement>(null);
  const { width } = useSize(box);
  const wide = width >= WIDE;
  const { selected } = model;
  const alone = selected !== null && !wide;
  const back = (): void => {
    model.select(null);
    window.requestAnimationFrame(() =>
      box.current?.querySelector<HTMLElement>('.jp-Hybrid-list')?.focus()
    );
  };
  return (
    <div
      ref={box}
      className={`jp-Hybrid-panel${wide ? ' jp-mod-wide' : ''}`}
      onKeyDown={event => {
        if (event.key === 'Escape' && alone && !event.defaultPrevented) {
          back();
        }
      }}
    >
      <Banner />
      <div className="jp-Hybrid-columns">
        {!alone && (
          <div className="jp-Hybrid-overview">
            <Pools />
            {(model.jobs.length > 0 || model.filtered) && <Filters />}
            <JobList />
          </div>
        )}
        {(selected || wide) && (
          <div className="jp-Hybrid-side">
            {selected ? (
              <JobDetail key={selected.id} job={selected} onBack={alone ? back : undefined} />
            ) : (
              <div className="jp-Hybrid-empty">{trans.__('Choose a job to see all of it.')}</div>
            )}
          </div>
        )}
      </div>
    </div>
  );
}
