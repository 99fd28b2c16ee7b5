/** "Run on: …" in the toolbar of a notebook: shows and rewrites the magic line of the active cell. */

import { Notification, ReactWidget } from '@jupyterlab/apputils';
import type { Cell } from '@jupyterlab/cells';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { HTMLSelect } from '@jupyterlab/ui-components';
import React from 'react';

import { tell } from './commands';
import { movable, parse, poolOf, sendTo, takeBack } from './magicline';
import { LOAD_EXTENSION, run } from './origin';
import type { IHybrid } from './tokens';

/** Stands for the notebook's own kernel; no pool can be called this. */
export const THIS_KERNEL = '';
/** Where a cell keeps the options of a magic line that was taken off, for the next pool. */
const METADATA = 'jupyter_hybrid';

/** Notebooks that were told that a cell with `%load_ext` is missing. */
const told = new WeakSet<NotebookPanel>();

function chosenCells(panel: NotebookPanel): Cell[] {
  const { content } = panel;
  return content.widgets.filter(
    cell => cell.model.type === 'code' && content.isSelectedOrActive(cell)
  );
}

/** Write the magic line of a pool on the chosen cells, or take it off. */
export async function runOn(panel: NotebookPanel, hybrid: IHybrid, name: string): Promise<void> {
  const { pools } = hybrid.model;
  const pool = pools.find(each => each.name === name);
  for (const { model } of chosenCells(panel)) {
    const source = model.sharedModel.getSource();
    if (pool) {
      const kept = model.getMetadata(METADATA) as { options?: string } | undefined;
      model.sharedModel.setSource(sendTo(source, pool, pools, hybrid.trans, kept?.options));
      model.deleteMetadata(METADATA);
    } else {
      const taken = takeBack(source);
      model.sharedModel.setSource(taken.source);
      if (taken.options) {
        model.setMetadata(METADATA, { options: taken.options });
      }
    }
  }
  if (pool) {
    await loadExtension(panel, hybrid);
  }
}

/** Load the magics into the notebook's kernel, and say how they are there the next time. */
async function loadExtension(panel: NotebookPanel, hybrid: IHybrid): Promise<void> {
  const kernel = panel.sessionContext.session?.kernel;
  if (!kernel) {
    return;
  }
  const { trans } = hybrid;
  try {
    await run(kernel, LOAD_EXTENSION);
  } catch (error) {
    const words = error instanceof Error ? error.message : String(error);
    throw new Error(trans.__('The kernel of this notebook cannot load jupyter_hybrid. %1', words));
  }
  const loads = panel.content.widgets.some(cell =>
    cell.model.sharedModel.getSource().includes('load_ext jupyter_hybrid')
  );
  if (loads || told.has(panel)) {
    return;
  }
  told.add(panel);
  Notification.info(
    trans.__(
      'The magics were loaded into this kernel. A cell with %load_ext does it in every run.'
    ),
    {
      autoClose: 15_000,
      actions: [
        {
          label: trans.__('Add the cell'),
          callback: () => {
            panel.content.model?.sharedModel.insertCell(0, {
              cell_type: 'code',
              source: '%load_ext jupyter_hybrid',
              metadata: { trusted: true }
            });
          }
        }
      ]
    }
  );
}

export class RunOnSelector extends ReactWidget {
  constructor(
    private readonly panel: NotebookPanel,
    private readonly hybrid: IHybrid
  ) {
    super();
    this.addClass('jp-Hybrid-runOn');
    panel.content.activeCellChanged.connect(this.onActiveCell, this);
    hybrid.model.changed.connect(this.onNews, this);
    this.onActiveCell();
  }

  dispose(): void {
    if (!this.isDisposed) {
      this.hybrid.model.changed.disconnect(this.onNews, this);
      this.cell?.model.contentChanged.disconnect(this.onNews, this);
      super.dispose();
    }
  }

  protected render(): JSX.Element {
    const { trans, model } = this.hybrid;
    const source = this.cell?.model.sharedModel.getSource() ?? '';
    const code = this.cell?.model.type === 'code';
    const free = code && movable(source);
    const foreign = code && !free ? `%%${parse(source)?.name}` : '';
    const value = free ? (poolOf(source, model.pools) ?? THIS_KERNEL) : foreign;
    const names = model.pools.map(pool => pool.name);
    const unknown = value && !names.includes(value) ? [value] : [];
    return (
      <label
        title={
          foreign
            ? trans.__('The cell has a magic of its own: %1', foreign)
            : trans.__('Where the chosen cells run')
        }
      >
        <span className="jp-Hybrid-runOnLabel">{trans.__('Run on:')}</span>
        <HTMLSelect
          className="jp-Notebook-toolbarCellTypeDropdown"
          value={value}
          disabled={!free}
          aria-label={trans.__('Run on')}
          onChange={event => {
            void runOn(this.panel, this.hybrid, event.target.value).catch(tell);
            this.panel.content.activate();
          }}
        >
          <option value={THIS_KERNEL}>{trans.__('this kernel')}</option>
          {[...names, ...unknown].map(name => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
        </HTMLSelect>
      </label>
    );
  }

  private onActiveCell(): void {
    this.cell?.model?.contentChanged.disconnect(this.onNews, this);
    this.cell = this.panel.content.activeCell;
    this.cell?.model.contentChanged.connect(this.onNews, this);
    this.onNews();
  }

  /** Render again only if something to see has changed: every key stroke comes by here. */
  private onNews(): void {
    const source = this.cell?.model?.sharedModel.getSource() ?? '';
    const line = source.trimStart().startsWith('%%') ? parse(source) : null;
    const seen = JSON.stringify([
      this.cell?.model?.type,
      line?.name,
      line?.options,
      this.hybrid.model.pools.map(pool => [pool.name, pool.kind])
    ]);
    if (seen !== this.seen) {
      this.seen = seen;
      this.update();
    }
  }

  private cell: Cell | null = null;
  private seen = '';
}
