/** From a job back to its notebook: to the cell it came from, and to the kernel that wants its results. */

import type { IDocumentManager } from '@jupyterlab/docmanager';
import type { INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import type { Kernel } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';

import type { IJob, IJobDetail } from './types';

/** Whether a job comes from a notebook that is open. */
export function isNotebookOf(panel: NotebookPanel, job: IJob): boolean {
  return Boolean(job.notebook_browser) && panel.context.localPath === job.notebook_browser;
}

async function openNotebook(
  job: IJobDetail,
  documents: IDocumentManager,
  trans: TranslationBundle
): Promise<NotebookPanel> {
  const path = job.notebook_browser;
  if (!path) {
    throw new Error(
      job.notebook
        ? trans.__(
            'Job %1 comes from %2, which the file browser does not show.',
            job.id,
            job.notebook
          )
        : trans.__('Job %1 comes from a place without a notebook.', job.id)
    );
  }
  const widget = documents.openOrReveal(path);
  if (!widget || !('sessionContext' in widget)) {
    throw new Error(trans.__('%1 cannot be opened as a notebook.', path));
  }
  await widget.context.ready;
  await widget.revealed;
  return widget as NotebookPanel;
}

/** Open the notebook of a job and make its cell the active one. */
export async function openCell(
  job: IJobDetail,
  documents: IDocumentManager,
  trans: TranslationBundle
): Promise<void> {
  const { content } = await openNotebook(job, documents, trans);
  const index = content.widgets.findIndex(cell => cell.model.id === job.origin.cell);
  if (index >= 0) {
    content.activeCellIndex = index;
    await content.scrollToItem(index, 'center');
  }
}

/** Bind what a job gives back in its notebook's kernel, and return what the kernel says. */
export async function loadResults(
  job: IJobDetail,
  documents: IDocumentManager,
  notebooks: INotebookTracker | null,
  trans: TranslationBundle
): Promise<string> {
  const open = notebooks?.find(panel => isNotebookOf(panel, job));
  const panel = open ?? (await openNotebook(job, documents, trans));
  await panel.sessionContext.ready;
  const kernel = (await livingKernel(panel)) ?? (await startKernel(panel, trans));
  return run(
    kernel,
    `${LOAD_EXTENSION}\nget_ipython().run_line_magic('hybrid', 'result ${job.id}')`
  );
}

/** Return a notebook's kernel. After the server was away, Lab may not know yet whether it still lives: look. */
async function livingKernel(panel: NotebookPanel): Promise<Kernel.IKernelConnection | null> {
  const { sessionContext } = panel;
  const known = sessionContext.session?.kernel;
  if (!known || known.connectionStatus === 'connected') {
    return known ?? null;
  }
  await sessionContext.kernelManager?.refreshRunning();
  await sessionContext.sessionManager.refreshRunning();
  const kernel = sessionContext.session?.kernel;
  if (!kernel || kernel.isDisposed) {
    return null;
  }
  await kernel.reconnect();
  return kernel;
}

/** Start the kernel that a notebook asks for, where it has none: its server was started again, say. */
async function startKernel(
  panel: NotebookPanel,
  trans: TranslationBundle
): Promise<Kernel.IKernelConnection> {
  const { sessionContext } = panel;
  const { name } = sessionContext.kernelPreference;
  const kernel = name ? await sessionContext.changeKernel({ name }) : null;
  if (!kernel) {
    throw new Error(
      trans.__('%1 has no kernel; choose one, then load the results.', panel.context.path)
    );
  }
  return kernel;
}

export const LOAD_EXTENSION =
  "get_ipython().extension_manager.load_extension('jupyter_hybrid') and None";

/** Run code in a kernel without a trace in its history; return what it prints, raise what it raises. */
export async function run(kernel: Kernel.IKernelConnection, code: string): Promise<string> {
  let said = '';
  const future = kernel.requestExecute({ code, silent: false, store_history: false });
  future.onIOPub = message => {
    if (message.header.msg_type === 'stream') {
      said += (message.content as { text: string }).text;
    }
  };
  const reply = await future.done;
  if (reply.content.status === 'error') {
    const { ename, evalue } = reply.content as { ename: string; evalue: string };
    throw new Error(`${ename}: ${evalue}`);
  }
  return said.trim();
}
