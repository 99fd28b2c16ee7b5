/** The list of jobs: only the rows in sight are in the page, more are loaded when the end comes near. */

import type { TranslationBundle } from '@jupyterlab/translation';
import React, { useEffect, useRef, useState } from 'react';

import { CommandIDs } from '../commandids';
import { duration, elapsed, moment } from '../format';
import { StateIcon } from '../icons';
import type { IJob } from '../types';
import { stateWord } from '../words';
import { useNow, useSignal, useSize, useView } from './context';
import { JobsAbsent } from './placeholders';
import { Progress } from './progress';

const ROW = 48;
/** Rows beyond the edges, so that scrolling shows no gap. */
const MARGIN = 6;

/** What is most worth knowing of a job in a few words. */
function brief(job: IJob, now: number, trans: TranslationBundle): string {
  const words = [stateWord(job.state, job.held, trans), job.pool];
  if (job.array) {
    words.push(trans.__('%1 of %2', job.done, job.tasks));
    if (job.failed) {
      words.push(trans.__('%1 failed', job.failed));
    }
  }
  const span = elapsed(job, now);
  if (span !== null) {
    words.push(duration(span, trans));
  }
  return words.join(' · ');
}

export function JobList(): JSX.Element {
  const { model } = useView();
  useSignal(model.changed);
  return model.jobs.length ? <Rows /> : <JobsAbsent />;
}

/** Comes and goes as a whole, so that its size is followed from the moment it is in the page. */
function Rows(): JSX.Element {
  const { model, trans, commands, contextMenu } = useView();
  useSignal(model.changed);
  const box = useRef<HTMLDivElement>(null);
  const { height } = useSize(box);
  const [top, setTop] = useState(0);
  const [active, setActive] = useState<string | null>(null);
  const jobs = model.jobs;
  const first = Math.max(0, Math.floor(top / ROW) - MARGIN);
  const last = Math.min(jobs.length, Math.ceil((top + height) / ROW) + MARGIN);
  const shown = jobs.slice(first, last);
  const now = useNow(shown.some(job => job.started !== null && job.ended === null));

  useEffect(() => {
    if (model.hasMore && last > jobs.length - 50) {
      void model.loadMore();
    }
  }, [model, last, jobs.length, model.hasMore]);

  const at = jobs.findIndex(job => job.id === active);
  const move = (index: number): void => {
    const target = Math.max(0, Math.min(jobs.length - 1, index));
    const element = box.current;
    if (!element || !jobs[target]) {
      return;
    }
    setActive(jobs[target].id);
    if (target * ROW < element.scrollTop) {
      element.scrollTop = target * ROW;
    } else if ((target + 1) * ROW > element.scrollTop + element.clientHeight) {
      element.scrollTop = (target + 1) * ROW - element.clientHeight;
    }
  };
  /** Open the menu that a right click opens on the active row; the list has the focus again when it closes. */
  const openMenu = (): void => {
    const row = box.current?.querySelector('.jp-mod-active');
    if (!row) {
      return;
    }
    const { left, top } = row.getBoundingClientRect();
    const place = { clientX: left + ROW / 2, clientY: top + ROW / 2 };
    row.dispatchEvent(new MouseEvent('contextmenu', { bubbles: true, cancelable: true, ...place }));
    const { menu } = contextMenu;
    const back = (): void => {
      menu.aboutToClose.disconnect(back);
      box.current?.focus();
    };
    menu.aboutToClose.connect(back);
  };
  const page = Math.max(1, Math.floor(height / ROW) - 1);
  const onKeyDown = (event: React.KeyboardEvent): void => {
    const moves: Record<string, number> = {
      ArrowDown: at + 1,
      ArrowUp: at - 1,
      PageDown: at + page,
      PageUp: at - page,
      Home: 0,
      End: jobs.length - 1
    };
    if (event.key in moves) {
      move(moves[event.key]);
    } else if ((event.key === 'Enter' || event.key === ' ') && at >= 0) {
      void commands.execute(CommandIDs.openJob, { id: jobs[at].id });
    } else if (event.key === 'ContextMenu' || (event.key === 'F10' && event.shiftKey)) {
      openMenu();
    } else {
      return;
    }
    event.preventDefault();
  };

  return (
    <div
      ref={box}
      className="jp-Hybrid-list"
      role="listbox"
      tabIndex={0}
      aria-label={trans.__('Jobs')}
      aria-busy={model.loading}
      aria-activedescendant={at >= first && at < last ? `jp-hybrid-${active}` : undefined}
      onScroll={event => setTop(event.currentTarget.scrollTop)}
      onKeyDown={onKeyDown}
      onFocus={() => {
        if (at < 0) {
          setActive(model.selected?.id ?? jobs[0].id);
        }
      }}
    >
      <div role="presentation" style={{ height: jobs.length * ROW, position: 'relative' }}>
        {shown.map((job, offset) => (
          <div
            key={job.id}
            id={`jp-hybrid-${job.id}`}
            className={
              'jp-Hybrid-job' +
              (job.id === model.selected?.id ? ' jp-mod-selected' : '') +
              (job.id === active ? ' jp-mod-active' : '')
            }
            data-job={job.id}
            role="option"
            aria-selected={job.id === model.selected?.id}
            aria-setsize={model.total || jobs.length}
            aria-posinset={first + offset + 1}
            style={{ top: (first + offset) * ROW, height: ROW }}
            title={`${job.name}\n${trans.__('job %1, created %2', job.id, moment(job.created))}`}
            onClick={() => {
              setActive(job.id);
              void commands.execute(CommandIDs.openJob, { id: job.id });
            }}
          >
            <StateIcon state={job.state} held={job.held} />
            <div className="jp-Hybrid-jobText">
              <div className="jp-Hybrid-jobHead">
                <span className="jp-Hybrid-name">{job.name.split('\n', 1)[0] || job.id}</span>
                <time className="jp-Hybrid-muted">{moment(job.created)}</time>
              </div>
              <div className="jp-Hybrid-brief">{brief(job, now, trans)}</div>
              {job.array && job.state === 'RUNNING' && <Progress job={job} small />}
            </div>
          </div>
        ))}
      </div>
    </div>
  );
}
