/** The plugin of notebooks: "Run on" in the toolbar, at each cell, in the context menu and in the palette. */

import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IToolbarWidgetRegistry } from '@jupyterlab/apputils';
import type { NotebookPanel } from '@jupyterlab/notebook';
import { INotebookTracker, NotebookActions } from '@jupyterlab/notebook';
import { MenuSvg } from '@jupyterlab/ui-components';

import { CommandIDs } from './commandids';
import { tell } from './commands';
import { hybridIcon } from './icons';
import { runOn, RunOnSelector, THIS_KERNEL } from './runon';
import { IHybrid } from './tokens';

const CELL = '.jp-Notebook .jp-CodeCell';

export const notebookPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-hybrid:notebook',
  description: 'Chooses where the cells of a notebook run.',
  autoStart: true,
  requires: [IHybrid, INotebookTracker],
  optional: [IToolbarWidgetRegistry],
  activate: (
    app: JupyterFrontEnd,
    hybrid: IHybrid,
    notebooks: INotebookTracker,
    toolbars: IToolbarWidgetRegistry | null
  ) => {
    const { commands } = app;
    const { model, trans } = hybrid;

    toolbars?.addFactory<NotebookPanel>(
      'Notebook',
      'hybridRunOn',
      panel => new RunOnSelector(panel, hybrid)
    );

    const menu = new MenuSvg({ commands });
    menu.title.label = trans.__('Run Cell On');
    menu.title.icon = hybridIcon;
    let shown = '';
    const fill = (): void => {
      const first = hybrid.defaultPool;
      const names = model.pools.map(pool => pool.name);
      names.sort((a, b) => Number(b === first) - Number(a === first));
      if (shown === names.join('\n')) {
        return;
      }
      shown = names.join('\n');
      menu.clearItems();
      for (const pool of names) {
        menu.addItem({ command: CommandIDs.runCellOn, args: { pool } });
      }
      menu.addItem({ type: 'separator' });
      menu.addItem({ command: CommandIDs.runCellOn, args: { pool: THIS_KERNEL } });
    };
    fill();
    model.changed.connect(fill);
    app.contextMenu.addItem({ type: 'submenu', submenu: menu, selector: CELL, rank: 0 });

    commands.addCommand(CommandIDs.runCellOn, {
      label: args => {
        if (args.pool === THIS_KERNEL) {
          return trans.__('This Kernel');
        }
        const pool = model.pools.find(each => each.name === args.pool);
        if (!pool) {
          return trans.__('Run Cell On…');
        }
        return pool.cpus_free === null
          ? pool.name
          : trans._n('%2 (%1 cpu free)', '%2 (%1 cpus free)', pool.cpus_free, pool.name);
      },
      caption: trans.__('Run the cell as a job on a pool'),
      icon: args => (args.pool === undefined ? hybridIcon : undefined),
      describedBy: { args: { type: 'object', properties: { pool: { type: 'string' } } } },
      isEnabled: () => notebooks.activeCell?.model.type === 'code',
      execute: async args => {
        const panel = notebooks.currentWidget;
        const cell = notebooks.activeCell;
        if (!panel || !cell) {
          return;
        }
        if (typeof args.pool !== 'string') {
          fill();
          const place = cell.node.getBoundingClientRect();
          const top = Math.max(place.top, panel.node.getBoundingClientRect().top) + 28;
          menu.open(Math.max(place.left, place.right - 260), top);
          return;
        }
        try {
          await runOn(panel, hybrid, args.pool);
          await NotebookActions.run(panel.content, panel.sessionContext);
        } catch (error) {
          tell(error);
        }
      }
    });
    commands.addCommand(CommandIDs.setRunOn, {
      label: trans.__('Choose Where Cell Runs'),
      caption: trans.__('Go to "Run on" in the toolbar of the notebook'),
      describedBy: { args: { type: 'object', properties: {} } },
      isEnabled: () => notebooks.currentWidget !== null,
      execute: () => {
        notebooks.currentWidget?.toolbar.node
          .querySelector<HTMLElement>('.jp-Hybrid-runOn select')
          ?.focus();
      }
    });
  }
};
