/** The commands on jobs: what views, menus, the palette and notifications run. */

import type { JupyterFrontEnd } from '@jupyterlab/application';
import { Clipboard, Dialog, Notification, showDialog } from '@jupyterlab/apputils';
import type { IDocumentManager } from '@jupyterlab/docmanager';
import type { INotebookTracker } from '@jupyterlab/notebook';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { ReadonlyPartialJSONObject } from '@lumino/coreutils';

import type { JobAction } from './api';
import { RequestError } from './api';
import { CommandIDs } from './commandids';
import type { HybridModel } from './model';
import { loadResults, openCell } from './origin';
import { askResources } from './retrydialog';
import type { IJob } from './types';
import { isFinal } from './types';

export interface ICommandOptions {
  app: JupyterFrontEnd;
  model: HybridModel;
  trans: TranslationBundle;
  documents: IDocumentManager;
  notebooks: INotebookTracker | null;
}

/** Tell what went wrong, in the server's words. */
export function tell(error: unknown): void {
  const hint = error instanceof RequestError ? error.hint : '';
  const words = error instanceof Error ? error.message : String(error);
  Notification.error([words, hint].filter(Boolean).join('\n'), { autoClose: 10_000 });
}

/** Add the commands on jobs. Each takes `id`; without it, it is for the job that is open, or under the pointer. */
export function addJobCommands(options: ICommandOptions): void {
  const { app, model, trans, documents, notebooks } = options;
  const { commands } = app;

  const idOf = (args: ReadonlyPartialJSONObject): string | null => {
    if (typeof args.id === 'string') {
      return args.id;
    }
    const hit = args.pointed
      ? app.contextMenuHitTest(node => node.dataset.job !== undefined)
      : undefined;
    return hit?.dataset.job ?? model.selected?.id ?? null;
  };
  const jobOf = (args: ReadonlyPartialJSONObject): IJob | null => {
    const id = idOf(args);
    return id === null
      ? null
      : (model.find(id) ?? (model.selected?.id === id ? model.selected.row : null));
  };

  /** Add a command on a job; it is not offered where it would do nothing. */
  const add = (
    command: string,
    label: string,
    caption: string,
    useful: (job: IJob) => boolean,
    execute: (id: string) => Promise<void>
  ): void => {
    commands.addCommand(command, {
      label,
      caption,
      describedBy: { args: { type: 'object', properties: { id: { type: 'string' } } } },
      isEnabled: args => {
        const job = jobOf(args);
        return job ? useful(job) : typeof args.id === 'string';
      },
      execute: async args => {
        const id = idOf(args);
        if (id !== null) {
          await execute(id).catch(tell);
        }
      }
    });
  };
  const act = (action: JobAction, body?: object) => (id: string) => model.act(id, action, body);
  const nameOf = (id: string): string => model.find(id)?.name.split('\n', 1)[0] || id;
  const confirm = async (title: string, body: string, yes: string): Promise<boolean> => {
    const buttons = [
      Dialog.cancelButton({ label: trans.__('Keep') }),
      Dialog.warnButton({ label: yes })
    ];
    return (await showDialog({ title, body, buttons })).button.accept;
  };

  add(
    CommandIDs.cancel,
    trans.__('Cancel Job'),
    trans.__('End the job'),
    job => !isFinal(job.state),
    async id => {
      const title = trans.__('Cancel "%1"?', nameOf(id));
      if (
        await confirm(
          title,
          trans.__('What is done stays; the rest is ended.'),
          trans.__('Cancel job')
        )
      ) {
        await model.act(id, 'cancel');
      }
    }
  );
  add(
    CommandIDs.retryFailed,
    trans.__('Retry Job'),
    trans.__('Run again what has no result'),
    job => isFinal(job.state) && job.state !== 'COMPLETED',
    act('retry', { tasks: 'failed' })
  );
  add(
    CommandIDs.retryWith,
    trans.__('Retry Job With…'),
    trans.__('Run again what has no result, with more memory or time'),
    job => isFinal(job.state) && job.state !== 'COMPLETED',
    async id => {
      const resources = await askResources(await model.api.job(id), trans);
      if (resources) {
        await model.act(id, 'retry', { tasks: 'failed', resources });
      }
    }
  );
  add(
    CommandIDs.retryAll,
    trans.__('Run All Tasks Again'),
    trans.__('Run every task again, those with a result too'),
    job => isFinal(job.state),
    act('retry', { tasks: 'all' })
  );
  add(
    CommandIDs.hold,
    trans.__('Hold Job'),
    trans.__('Keep the job from starting'),
    job => job.state === 'PENDING' && !job.held,
    act('hold')
  );
  add(
    CommandIDs.release,
    trans.__('Release Job'),
    trans.__('Let the job start again'),
    job => job.held,
    act('release')
  );
  add(
    CommandIDs.copyId,
    trans.__('Copy Job ID'),
    trans.__('Copy the id of the job; hy.job("…") finds it from any kernel'),
    () => true,
    async id => Clipboard.copyToSystem(id)
  );
  add(
    CommandIDs.openFolder,
    trans.__('Open Run Folder'),
    trans.__('Show the run folder in the file browser'),
    () => true,
    async id => {
      const { folder_browser, folder } = await model.api.job(id);
      if (folder_browser === null) {
        throw new Error(
          trans.__('The run folder is outside of what the file browser shows: %1', folder)
        );
      }
      await commands.execute('filebrowser:open-path', { path: folder_browser });
    }
  );
  add(
    CommandIDs.openCell,
    trans.__('Show Cell of Job'),
    trans.__('Open the notebook at the cell that the job came from'),
    job => Boolean(job.notebook_browser),
    async id => openCell(await model.api.job(id), documents, trans)
  );
  add(
    CommandIDs.loadResults,
    trans.__('Load Results of Job'),
    trans.__('Bind what the job gives back in the kernel of its notebook'),
    job => job.state === 'COMPLETED' && Boolean(job.notebook_browser),
    async id => {
      const said = await loadResults(await model.api.job(id), documents, notebooks, trans);
      Notification.success(said || trans.__('The results are loaded.'), { autoClose: 5000 });
    }
  );
  add(
    CommandIDs.cleanUp,
    trans.__('Clean Up Job'),
    trans.__('Delete the run folder of a job that has ended'),
    job => isFinal(job.state),
    async id => {
      const title = trans.__('Clean up "%1"?', nameOf(id));
      const body = trans.__('Its run folder is deleted, with results, logs and checkpoints.');
      if (await confirm(title, body, trans.__('Delete'))) {
        await model.remove(id);
      }
    }
  );
  commands.addCommand(CommandIDs.openJob, {
    label: trans.__('Show Job'),
    describedBy: { args: { type: 'object', properties: { id: { type: 'string' } } } },
    execute: args => {
      const id = idOf(args);
      if (id !== null) {
        model.choose(id);
      }
    }
  });
  commands.addCommand(CommandIDs.refresh, {
    label: trans.__('Refresh Jobs and Pools'),
    describedBy: { args: { type: 'object', properties: {} } },
    execute: () => model.reload()
  });
}
