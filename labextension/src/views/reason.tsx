/** Why a job or a task ended badly, or waits: the cause in a word, and what was said. */

import React from 'react';

import { causeWord } from '../words';
import { useView } from './context';

export function Reason(props: {
  of: { cause: string | null; reason: string };
  children?: React.ReactNode;
}): JSX.Element | null {
  const { trans } = useView();
  const { cause, reason } = props.of;
  if (!cause && !reason) {
    return null;
  }
  return (
    <div className={cause ? 'jp-Hybrid-reason' : 'jp-Hybrid-muted'}>
      {cause && <strong>{causeWord(cause, trans)}</strong>}
      {cause && reason && ': '}
      {reason}
      {props.children}
    </div>
  );
}
