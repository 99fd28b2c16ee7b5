/** The panel's icon and those of the states: each has a shape of its own, so that none is told by colour alone. */

import { LabIcon } from '@jupyterlab/ui-components';
import React from 'react';

import type { JobState } from './types';

/** A cell on top, nodes below: what is sent to where. */
export const hybridIcon = new LabIcon({
  name: 'jupyter-hybrid:jobs',
  svgstr: `<svg xmlns="http://www.w3.org/2000/svg" width="16" viewBox="0 0 24 24">
  <g class="jp-icon3 jp-icon-selectable" fill="#616161">
    <path d="M4 2h16a1 1 0 0 1 1 1v5a1 1 0 0 1-1 1H4a1 1 0 0 1-1-1V3a1 1 0 0 1 1-1zm1 2v3h14V4z"/>
    <path d="M11 9h2v3h6a1 1 0 0 1 1 1v3h-2v-2h-5v2h-2v-2H6v2H4v-3a1 1 0 0 1 1-1h6z"/>
    <path d="M2 16h6v6H2zM9 16h6v6H9zM16 16h6v6h-6z"/>
  </g>
</svg>`
});

const SHAPES: Record<JobState | 'HELD', JSX.Element> = {
  NEW: <circle cx="8" cy="8" r="5.5" fill="none" stroke="currentColor" strokeDasharray="2.5 2" />,
  PENDING: (
    <g fill="none" stroke="currentColor" strokeLinecap="round">
      <circle cx="8" cy="8" r="6" />
      <path d="M8 4.5V8l2.5 1.5" />
    </g>
  ),
  RUNNING: <path d="M4 2.5v11l9-5.5z" fill="currentColor" />,
  COMPLETED: (
    <path
      d="M2.5 8.5l3.5 4 7.5-9"
      fill="none"
      stroke="currentColor"
      strokeLinecap="round"
      strokeWidth="2.2"
    />
  ),
  FAILED: (
    <path
      d="M3.5 3.5l9 9m0-9l-9 9"
      fill="none"
      stroke="currentColor"
      strokeLinecap="round"
      strokeWidth="2.2"
    />
  ),
  CANCELLED: (
    <g fill="none" stroke="currentColor" strokeWidth="1.6">
      <circle cx="8" cy="8" r="5.7" />
      <path d="M4 12l8-8" />
    </g>
  ),
  TIMEOUT: (
    <g fill="none" stroke="currentColor" strokeLinecap="round" strokeWidth="1.4">
      <path d="M4 2h8M4 14h8M5 2c0 4 6 5 6 8.500V14M11 2c0 4-6 5-6 8.500V14" />
    </g>
  ),
  UNKNOWN: (
    <g fill="none" stroke="currentColor" strokeLinecap="round" strokeWidth="1.6">
      <path d="M5 6a3 3 0 1 1 4.200 2.700Q8 9.300 8 10.500M8 13.400v.1" />
    </g>
  ),
  HELD: <path d="M4 3h3v10H4zM9 3h3v10H9z" fill="currentColor" />
};

/** Stands before words that warn; Lab has no icon of this kind. */
export function WarningIcon(): JSX.Element {
  return (
    <svg
      className="jp-Hybrid-warningIcon"
      viewBox="0 0 24 24"
      width="14"
      height="14"
      aria-hidden="true"
    >
      <path fill="currentColor" d="M1 21h22L12 2zm12-3h-2v-2h2zm0-4h-2v-4h2z" />
    </svg>
  );
}

/** The icon of a state; the word stands beside it. */
export function StateIcon(props: { state: JobState; held?: boolean }): JSX.Element {
  const state = props.held && props.state === 'PENDING' ? 'HELD' : props.state;
  return (
    <svg
      className={`jp-Hybrid-state jp-Hybrid-is-${state}`}
      viewBox="0 0 16 16"
      width="14"
      height="14"
      aria-hidden="true"
    >
      {SHAPES[state]}
    </svg>
  );
}
