/** The end of a log; it stays at its last line unless the reader has scrolled up. */

import React, { useLayoutEffect, useMemo, useRef } from 'react';

import { WarningIcon } from '../icons';
import type { LogModel } from '../logmodel';
import { plain } from '../logmodel';
import { useSignal, useView } from './context';

export function Log(props: { log: LogModel; finished: boolean; array: boolean }): JSX.Element {
  const { trans } = useView();
  const { log } = props;
  useSignal(log.changed);
  const box = useRef<HTMLPreElement>(null);
  const follow = useRef(true);
  const text = useMemo(() => plain(log.text), [log.text]);
  useLayoutEffect(() => {
    if (box.current && follow.current) {
      box.current.scrollTop = box.current.scrollHeight;
    }
  }, [text]);
  if (log.loading) {
    return <div className="jp-Hybrid-muted">{trans.__('Loading…')}</div>;
  }
  return (
    <>
      {log.error && (
        <div className="jp-Hybrid-warning" role="status">
          <WarningIcon /> {log.error}
        </div>
      )}
      {props.array && log.place.task === undefined && (
        <div className="jp-Hybrid-muted">{trans.__('Log of batch %1', log.place.batch)}</div>
      )}
      {log.cut && (
        <div className="jp-Hybrid-muted">
          {trans.__('The end of the log; all of it is in the run folder.')}
        </div>
      )}
      {text ? (
        <pre
          ref={box}
          className="jp-Hybrid-log"
          tabIndex={0}
          aria-label={trans.__('Log')}
          role="log"
          onScroll={event => {
            const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
            follow.current = scrollHeight - scrollTop - clientHeight < 8;
          }}
        >
          {text}
        </pre>
      ) : (
        <div className="jp-Hybrid-muted">
          {props.finished ? trans.__('Nothing was written.') : trans.__('Nothing is written yet.')}
        </div>
      )}
    </>
  );
}
