/** Tells that a job has ended, unless the user looks at its notebook, where the card tells it. */

import { Notification } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import type { CommandRegistry } from '@lumino/commands';

import { CommandIDs } from './commandids';
import { isNotebookOf } from './origin';
import type { IHybrid } from './tokens';
import { causeWord, stateWord } from './words';

export function notifyOfEnds(
  hybrid: IHybrid,
  commands: CommandRegistry,
  notebook: () => NotebookPanel | null
): void {
  const { model, trans } = hybrid;
  model.ended.connect((_, job) => {
    const good = job.state === 'COMPLETED';
    if (hybrid.notifications === 'none' || (hybrid.notifications === 'failed' && good)) {
      return;
    }
    if (job.state === 'CANCELLED') {
      return; // the user did it
    }
    const current = notebook();
    const seen = current !== null && current.isVisible && isNotebookOf(current, job);
    if (seen && !document.hidden) {
      return;
    }
    const head = `${job.name.split('\n', 1)[0] || job.id}: ${stateWord(job.state, false, trans)}`;
    const why = good
      ? ''
      : [job.cause && causeWord(job.cause, trans), job.reason].filter(Boolean).join(': ');
    const actions: Notification.IAction[] = [
      {
        label: trans.__('Show log'),
        callback: () => void commands.execute(CommandIDs.openJob, { id: job.id })
      }
    ];
    if (good && job.notebook_browser && job.kind === 'cell') {
      actions.unshift({
        label: trans.__('Load results'),
        displayType: 'accent',
        callback: () => void commands.execute(CommandIDs.loadResults, { id: job.id })
      });
    }
    Notification.emit([head, why].filter(Boolean).join('\n'), good ? 'success' : 'error', {
      actions,
      autoClose: good ? 15_000 : false
    });
  });
}
