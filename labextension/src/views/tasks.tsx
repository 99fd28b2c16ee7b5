/** The tasks of an array as a field of squares on a canvas, one for each; readable from ten to many thousands. */

import { closeIcon } from '@jupyterlab/ui-components';
import React, { useEffect, useMemo, useRef, useState } from 'react';

import type { JobModel } from '../jobmodel';
import { duration } from '../format';
import { COLOURS, draw, layOut } from '../grid';
import { TASK_LETTERS } from '../types';
import { taskWord } from '../words';
import { useSignal, useSize, useView } from './context';
import { Log } from './log';
import { Reason } from './reason';

function Legend(props: {
  states: string;
  shown: string;
  onShow: (letter: string) => void;
}): JSX.Element {
  const { trans } = useView();
  const counts = useMemo(() => {
    const found: Record<string, number> = {};
    for (const letter of props.states) {
      found[letter] = (found[letter] ?? 0) + 1;
    }
    return found;
  }, [props.states]);
  return (
    <div className="jp-Hybrid-chips" role="group" aria-label={trans.__('Point out tasks')}>
      {Array.from(TASK_LETTERS)
        .filter(letter => counts[letter])
        .map(letter => (
          <button
            key={letter}
            className="jp-Hybrid-chip"
            aria-pressed={props.shown === letter}
            onClick={() => props.onShow(props.shown === letter ? '' : letter)}
          >
            <span
              className="jp-Hybrid-square"
              aria-hidden="true"
              style={{ background: `var(${COLOURS[letter][0]}, ${COLOURS[letter][1]})` }}
            />
            {counts[letter].toLocaleString()} {taskWord(letter, trans)}
          </button>
        ))}
    </div>
  );
}

export function Tasks(props: { job: JobModel }): JSX.Element {
  const { trans } = useView();
  const { job } = props;
  useSignal(job.changed);
  const box = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const { width } = useSize(box);
  const [shown, setShown] = useState('');
  const [under, setUnder] = useState<number | null>(null);
  const { states, index } = job;
  const layout = useMemo(() => layOut(states.length, width), [states.length, width]);

  useEffect(() => {
    const paint = (): void => {
      if (canvas.current && width) {
        draw(canvas.current, states, layout, shown, index);
      }
    };
    paint();
    // Another theme has other colours.
    const observer = new MutationObserver(paint);
    observer.observe(document.body, { attributes: true, attributeFilter: ['data-jp-theme-name'] });
    return () => observer.disconnect();
  }, [states, layout, shown, index, width]);

  const words = (task: number): string =>
    trans.__('task %1: %2', task, taskWord(states[task], trans));
  const choose = (task: number): void => {
    const target = Math.max(0, Math.min(states.length - 1, task));
    void job.choose(target);
    const scroller = box.current;
    if (scroller) {
      const y = Math.floor(target / layout.columns) * layout.cell;
      if (y < scroller.scrollTop || y + layout.cell > scroller.scrollTop + scroller.clientHeight) {
        scroller.scrollTop = y - scroller.clientHeight / 2;
      }
    }
  };
  const at = (event: React.MouseEvent<HTMLCanvasElement>): number | null => {
    const place = event.currentTarget.getBoundingClientRect();
    const column = Math.floor((event.clientX - place.left) / layout.cell);
    const found = Math.floor((event.clientY - place.top) / layout.cell) * layout.columns + column;
    return column < layout.columns && found < states.length ? found : null;
  };
  const onKeyDown = (event: React.KeyboardEvent): void => {
    const from = index ?? -1;
    const moves: Record<string, number> = {
      ArrowRight: from + 1,
      ArrowLeft: from - 1,
      ArrowDown: index === null ? 0 : from + layout.columns,
      ArrowUp: from - layout.columns,
      Home: 0,
      End: states.length - 1
    };
    if (event.key in moves) {
      choose(moves[event.key]);
    } else if (event.key === 'f' || event.key === 'F') {
      // The next failure: what one looks for among thousands.
      const next = states.indexOf('f', from + 1);
      choose(next >= 0 ? next : Math.max(0, states.indexOf('f')));
    } else if (event.key === 'Escape' && index !== null) {
      void job.choose(null);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  };

  return (
    <div>
      <Legend states={states} shown={shown} onShow={setShown} />
      <div className="jp-Hybrid-field" ref={box}>
        <canvas
          ref={canvas}
          className="jp-Hybrid-canvas"
          tabIndex={0}
          role="slider"
          aria-label={trans.__('Tasks; arrow keys move, F goes to the next failed one')}
          aria-valuemin={0}
          aria-valuemax={Math.max(0, states.length - 1)}
          aria-valuenow={index ?? 0}
          aria-valuetext={index === null ? trans.__('no task chosen') : words(index)}
          title={under === null ? '' : words(under)}
          onMouseMove={event => setUnder(at(event))}
          onMouseLeave={() => setUnder(null)}
          onClick={event => {
            const task = at(event);
            if (task !== null) {
              choose(task);
            }
          }}
          onKeyDown={onKeyDown}
        />
      </div>
      {index !== null && <Task job={job} index={index} />}
    </div>
  );
}

function Task(props: { job: JobModel; index: number }): JSX.Element {
  const { trans } = useView();
  const { job, index } = props;
  const letter = job.states[index] ?? 'w';
  const { task } = job;
  const part = useRef<HTMLElement>(null);
  useEffect(() => {
    part.current?.scrollIntoView({ block: 'nearest' });
  }, [index, task]);
  return (
    <section ref={part} className="jp-Hybrid-task" aria-label={trans.__('Task %1', index)}>
      <div className="jp-Hybrid-taskHead">
        <strong>{trans.__('Task %1', index)}</strong>
        <span>{taskWord(letter, trans)}</span>
        {task?.seconds !== null && task?.seconds !== undefined && (
          <span className="jp-Hybrid-muted">{duration(task.seconds, trans)}</span>
        )}
        {task?.batch !== null && task?.batch !== undefined && (
          <span className="jp-Hybrid-muted">{trans.__('batch %1', task.batch)}</span>
        )}
        <button
          className="jp-Hybrid-close"
          aria-label={trans.__('Close task')}
          title={trans.__('Close task')}
          onClick={() => void job.choose(null)}
        >
          <closeIcon.react tag="span" elementSize="normal" />
        </button>
      </div>
      {task && <Reason of={task} />}
      {task && job.log ? (
        <Log log={job.log} finished={letter !== 'w' && letter !== 'r'} array />
      ) : (
        <div className="jp-Hybrid-muted">
          {task ? trans.__('It has not begun; there is no log.') : trans.__('Loading…')}
        </div>
      )}
    </section>
  );
}
