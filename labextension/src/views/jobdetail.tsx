/** One job: how it stands and why, what to do about it, its tasks, log, script and all that is known of it. */

import type { TranslationBundle } from '@jupyterlab/translation';
import { Button, caretDownIcon, caretRightIcon } from '@jupyterlab/ui-components';
import React, { useState } from 'react';

import { CommandIDs } from '../commandids';
import { bytes, duration, elapsed, moment } from '../format';
import { StateIcon, WarningIcon } from '../icons';
import type { JobModel } from '../jobmodel';
import type { IJob, IJobDetail } from '../types';
import { isFinal } from '../types';
import { stateWord } from '../words';
import { useNow, useSignal, useView } from './context';
import { Facts } from './facts';
import { Log } from './log';
import { Loading } from './placeholders';
import { Progress } from './progress';
import { Reason } from './reason';
import { Tasks } from './tasks';

/** A part of the page that opens and closes. */
export function Section(props: {
  title: string;
  open?: boolean;
  onOpen?: () => void;
  children: React.ReactNode;
}): JSX.Element {
  const [open, setOpen] = useState(props.open ?? true);
  const Caret = open ? caretDownIcon.react : caretRightIcon.react;
  return (
    <section className="jp-Hybrid-section">
      <h3>
        <button
          aria-expanded={open}
          onClick={() => {
            if (!open) {
              props.onOpen?.();
            }
            setOpen(!open);
          }}
        >
          <Caret tag="span" className="jp-Hybrid-caret" />
          {props.title}
        </button>
      </h3>
      {open && <div className="jp-Hybrid-sectionBody">{props.children}</div>}
    </section>
  );
}

/** The buttons that would do something now. */
function Actions(props: { job: IJob; detail: IJobDetail | null }): JSX.Element {
  const { commands, trans } = useView();
  const { job, detail } = props;
  const buttons: [string, string, boolean, boolean][] = [
    [CommandIDs.cancel, trans.__('Cancel'), !isFinal(job.state), false],
    [
      CommandIDs.retryFailed,
      job.array ? trans.__('Retry failed') : trans.__('Retry'),
      isFinal(job.state) && job.state !== 'COMPLETED',
      job.cause !== 'OUT_OF_MEMORY' && job.cause !== 'TIMEOUT'
    ],
    [
      CommandIDs.retryWith,
      trans.__('Retry with…'),
      isFinal(job.state) && job.state !== 'COMPLETED',
      job.cause === 'OUT_OF_MEMORY' || job.cause === 'TIMEOUT'
    ],
    [CommandIDs.retryAll, trans.__('Run all again'), isFinal(job.state) && job.array, false],
    [CommandIDs.hold, trans.__('Hold'), job.state === 'PENDING' && !job.held, false],
    [CommandIDs.release, trans.__('Release'), job.held, true],
    [
      CommandIDs.loadResults,
      trans.__('Load results'),
      job.state === 'COMPLETED' && Boolean(job.notebook_browser) && Boolean(detail?.outputs.length),
      true
    ],
    [CommandIDs.openCell, trans.__('Show cell'), Boolean(job.notebook_browser), false],
    [CommandIDs.copyId, trans.__('Copy id'), true, false],
    [CommandIDs.openFolder, trans.__('Open folder'), Boolean(detail?.folder_browser), false],
    [CommandIDs.cleanUp, trans.__('Clean up'), isFinal(job.state), false]
  ];
  return (
    <div className="jp-Hybrid-actions" role="group" aria-label={trans.__('Actions')}>
      {buttons
        .filter(([, , useful]) => useful)
        .map(([command, label, , accent]) => (
          <Button
            key={command}
            small
            className={`jp-Hybrid-button${accent ? ' jp-mod-accept' : ''}`}
            title={commands.caption(command)}
            onClick={() => void commands.execute(command, { id: job.id })}
          >
            {label}
          </Button>
        ))}
    </div>
  );
}

/** What to do about a cause here in the panel; the server's advice is for those who type. */
function adviceFor(job: IJob, trans: TranslationBundle): string {
  switch (job.cause) {
    case 'OUT_OF_MEMORY':
      return trans.__('Ask for more memory: "Retry with…"');
    case 'TIMEOUT':
      return trans.__('Ask for more time: "Retry with…"');
    case 'NODE_FAILURE':
      return trans.__('The node failed, not the job: retry it.');
    case 'PREEMPTED':
      return trans.__('A job with higher priority took the node: retry it.');
    case 'USER_ERROR':
      return job.notebook ? trans.__('Correct the cell and run it again.') : '';
    case 'DEPENDENCY_FAILED':
      return trans.__('A job it depends on did not complete: retry that one, then this.');
    case 'SUBMIT_REJECTED':
      return trans.__('Change what it asks for: "Retry with…"');
    case 'RESULT_LOST':
      return trans.__('Retry runs only what is lost.');
    case 'INFRASTRUCTURE':
      return trans.__('"jupyter hybrid doctor" checks the pool; then retry.');
    default:
      return '';
  }
}

/** The failures of an array, those with the same message together. */
function Failures(props: { job: JobModel; detail: IJobDetail }): JSX.Element {
  const { trans } = useView();
  return (
    <ul className="jp-Hybrid-failures">
      {props.detail.failures.map(failure => (
        <li key={failure.message}>
          <div>
            <span className="jp-Hybrid-count">{failure.count.toLocaleString()}×</span>
            <code>{failure.message}</code>
          </div>
          <div className="jp-Hybrid-muted">
            {trans.__('tasks')}{' '}
            {failure.tasks.map(task => (
              <button
                key={task}
                className="jp-Hybrid-link"
                onClick={() => void props.job.choose(task)}
                aria-label={trans.__('Show task %1', task)}
              >
                {task}
              </button>
            ))}
            {failure.count > failure.tasks.length && '…'}
          </div>
        </li>
      ))}
    </ul>
  );
}

function Head(props: { job: IJob }): JSX.Element {
  const { trans } = useView();
  const { job } = props;
  const now = useNow(!isFinal(job.state));
  const span = elapsed(job, now);
  return (
    <header className="jp-Hybrid-head">
      <h2>{job.name.split('\n', 1)[0] || job.id}</h2>
      <div className="jp-Hybrid-headState" aria-live="polite">
        <StateIcon state={job.state} held={job.held} />
        <strong>{stateWord(job.state, job.held, trans)}</strong>
        <span className="jp-Hybrid-muted">{trans.__('on %1', job.pool)}</span>
      </div>
      <div className="jp-Hybrid-muted">
        {span === null
          ? trans.__('created %1', moment(job.created))
          : isFinal(job.state)
            ? trans.__('ran %1, ended %2', duration(span, trans), moment(job.ended ?? job.created))
            : trans.__(
                'for %1, since %2',
                duration(span, trans),
                moment(job.started ?? job.created)
              )}
      </div>
    </header>
  );
}

export function JobDetail(props: { job: JobModel; onBack?: () => void }): JSX.Element {
  const { trans, model } = useView();
  const { job } = props;
  useSignal(job.changed);
  useSignal(model.changed);
  const row = job.row;
  const detail = job.detail;
  const pool = model.pools.find(each => each.name === row?.pool);
  const advice = row && adviceFor(row, trans);
  return (
    <article
      className="jp-Hybrid-detail"
      aria-label={row ? trans.__('Job %1', row.name || row.id) : trans.__('Job')}
    >
      {props.onBack && (
        <button className="jp-Hybrid-link jp-Hybrid-back" onClick={props.onBack}>
          ← {trans.__('All jobs')}
        </button>
      )}
      {job.error && (
        <div className="jp-Hybrid-warning" role="status">
          <WarningIcon /> {job.error}{' '}
          <button className="jp-Hybrid-link" onClick={() => void job.refresh()}>
            {trans.__('Try again')}
          </button>
        </div>
      )}
      {!row && !job.error && <Loading label={trans.__('The job is being loaded')} />}
      {row && (
        <>
          <Head job={row} />
          {row.array && <Progress job={job.progress ?? row} />}
          {pool?.reachable === false && !isFinal(row.state) && (
            <div className="jp-Hybrid-warning">
              <WarningIcon />{' '}
              {trans.__(
                'Pool %1 does not answer since %2; this is how the job stood then.',
                pool.name,
                moment(pool.unreachable_since ?? 0)
              )}
            </div>
          )}
          <Reason of={row}>{advice && <div className="jp-Hybrid-advice">→ {advice}</div>}</Reason>
          <Actions job={row} detail={detail} />
        </>
      )}
      {row && !detail && !job.error && <Loading label={trans.__('The job is being loaded')} />}
      {row && detail && (
        <>
          {detail.failures.length > 0 && row.array && (
            <Section title={trans.__('Failures by message')}>
              <Failures job={job} detail={detail} />
            </Section>
          )}
          {row.array && (
            <Section title={trans.__('Tasks')}>
              <Tasks job={job} />
            </Section>
          )}
          {job.index === null && (
            <Section title={trans.__('Log')}>
              {job.log ? (
                <Log log={job.log} finished={isFinal(row.state)} array={row.array} />
              ) : (
                <div className="jp-Hybrid-muted">
                  {trans.__('It has not begun; there is no log.')}
                </div>
              )}
            </Section>
          )}
          <Section title={trans.__('Resources')}>
            <Facts job={detail} row={row} cost={job.cost} />
          </Section>
          <Section title={trans.__('Origin and data')}>
            <Origin detail={detail} row={row} />
          </Section>
          <Section title={trans.__('Script')} open={false} onOpen={() => void job.loadScript()}>
            {job.script === null ? (
              <Loading label={trans.__('The script is being loaded')} lines={2} />
            ) : (
              <pre className="jp-Hybrid-log" tabIndex={0} aria-label={trans.__('Script')}>
                {job.script}
              </pre>
            )}
          </Section>
        </>
      )}
    </article>
  );
}

/** Where the job comes from, what it takes and gives, and what it has saved. */
function Origin(props: { detail: IJobDetail; row: IJob }): JSX.Element {
  const { trans, commands } = useView();
  const { detail, row } = props;
  const lines: [string, React.ReactNode][] = [
    [trans.__('Job'), <code key="id">{row.id}</code>],
    [trans.__('At the scheduler'), row.native_id],
    [
      trans.__('Cell'),
      !row.notebook_browser ? (
        row.notebook
      ) : (
        <button
          className="jp-Hybrid-link"
          onClick={() => void commands.execute(CommandIDs.openCell, { id: row.id })}
        >
          {row.notebook.split('/').pop()}
        </button>
      )
    ],
    [trans.__('Takes along'), detail.inputs.join(', ')],
    [trans.__('Gives back'), detail.outputs.join(', ')],
    [
      trans.__('Starts after'),
      detail.after.length > 0 &&
        detail.after.map(id => (
          <button
            key={id}
            className="jp-Hybrid-link"
            onClick={() => void commands.execute(CommandIDs.openJob, { id })}
          >
            {id}
          </button>
        ))
    ],
    [trans.__('Attempts'), detail.attempts > 1 ? String(detail.attempts) : ''],
    [
      trans.__('Expected start'),
      detail.estimated_start && row.state === 'PENDING' ? moment(detail.estimated_start) : ''
    ],
    [
      trans.__('Last sign of life'),
      detail.last_heartbeat && row.state === 'RUNNING' ? moment(detail.last_heartbeat) : ''
    ],
    [
      trans.__('Hosts'),
      [...new Set(detail.batches.map(each => each.host).filter(Boolean))].slice(0, 8).join(', ')
    ],
    [trans.__('Directory'), detail.origin.directory],
    [trans.__('Run folder'), detail.folder],
    [
      trans.__('Checkpoints'),
      detail.checkpoints
        .map(each => `${each.name} (${bytes(each.size, trans)}, ${moment(each.modified)})`)
        .join(', ')
    ]
  ];
  return (
    <dl className="jp-Hybrid-facts">
      {lines
        .filter(([, value]) => value)
        .map(([name, value]) => (
          <React.Fragment key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </React.Fragment>
        ))}
    </dl>
  );
}
