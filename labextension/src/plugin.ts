/** The plugin of the panel: in the side bar, in the main area, in palette, menus and launcher. */

import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ILayoutRestorer } from '@jupyterlab/application';
import { ICommandPalette, MainAreaWidget, WidgetTracker } from '@jupyterlab/apputils';
import { IDocumentManager } from '@jupyterlab/docmanager';
import { ILauncher } from '@jupyterlab/launcher';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { HybridApi } from './api';
import { CommandIDs } from './commandids';
import { addJobCommands } from './commands';
import { hybridIcon } from './icons';
import { HybridModel } from './model';
import { notifyOfEnds } from './notify';
import { HybridPanel } from './panel';
import { IHybrid } from './tokens';

const NO_ARGUMENTS = { args: { type: 'object', properties: {} } };

export const panelPlugin: JupyterFrontEndPlugin<IHybrid> = {
  id: 'jupyter-hybrid:panel',
  description: 'Jobs on all pools, in a side panel.',
  autoStart: true,
  provides: IHybrid,
  requires: [IDocumentManager],
  optional: [
    ITranslator,
    ISettingRegistry,
    ILayoutRestorer,
    ICommandPalette,
    ILauncher,
    INotebookTracker
  ],
  activate: (
    app: JupyterFrontEnd,
    documents: IDocumentManager,
    translator: ITranslator | null,
    settings: ISettingRegistry | null,
    restorer: ILayoutRestorer | null,
    palette: ICommandPalette | null,
    launcher: ILauncher | null,
    notebooks: INotebookTracker | null
  ): IHybrid => {
    const trans = (translator ?? nullTranslator).load('jupyter_hybrid');
    const { serviceManager, commands, shell } = app;
    const model = new HybridModel(
      new HybridApi(serviceManager.serverSettings),
      serviceManager.events.stream
    );
    const view = { model, trans, commands, contextMenu: app.contextMenu };
    const hybrid: IHybrid = { model, trans, defaultPool: '', notifications: 'all' };

    const panel = new HybridPanel(view);
    panel.id = 'jupyter-hybrid-panel';
    shell.add(panel, 'left', { rank: 450, type: 'Jobs' });
    restorer?.add(panel, panel.id);

    const tracker = new WidgetTracker<MainAreaWidget<HybridPanel>>({ namespace: 'jupyter-hybrid' });
    addJobCommands({ app, model, trans, documents, notebooks });
    commands.addCommand(CommandIDs.openPanel, {
      label: trans.__('Show Jobs Panel'),
      caption: trans.__('Show jobs and pools in the side bar'),
      describedBy: NO_ARGUMENTS,
      execute: () => {
        shell.activateById(panel.id);
        panel.node.querySelector<HTMLElement>('[tabindex="0"], button')?.focus();
      }
    });
    commands.addCommand(CommandIDs.openDashboard, {
      label: args => (args.launcher ? trans.__('Jobs') : trans.__('Open Jobs in a Tab')),
      caption: trans.__('Jobs and pools in the main area'),
      icon: hybridIcon,
      describedBy: NO_ARGUMENTS,
      execute: () => {
        let widget = tracker.find(each => !each.isDisposed);
        if (!widget) {
          widget = new MainAreaWidget({ content: new HybridPanel(view) });
          widget.id = 'jupyter-hybrid-dashboard';
          widget.title.label = trans.__('Jobs');
          widget.title.icon = hybridIcon;
          widget.title.closable = true;
          shell.add(widget, 'main', { type: 'Jobs' });
          void tracker.add(widget);
        }
        shell.activateById(widget.id);
      }
    });
    void restorer?.restore(tracker, {
      command: CommandIDs.openDashboard,
      name: () => 'dashboard'
    });
    // A job that is chosen from elsewhere is shown where the user already looks at jobs, else in the side bar.
    model.chosen.connect(() => {
      if (!panel.isVisible && !tracker.find(each => each.isVisible)) {
        shell.activateById(panel.id);
      }
    });

    const category = trans.__('Jobs');
    for (const command of Object.values(CommandIDs)) {
      palette?.addItem({ command, category });
    }
    launcher?.add({
      command: CommandIDs.openDashboard,
      args: { launcher: true },
      category: trans.__('Other'),
      rank: 5
    });
    notifyOfEnds(hybrid, commands, () => notebooks?.currentWidget ?? null);

    void settings?.load(panelPlugin.id).then(loaded => {
      const apply = (): void => {
        const chosen = loaded.composite;
        model.refresh = chosen.refresh as number;
        hybrid.defaultPool = chosen.defaultPool as string;
        hybrid.notifications = chosen.notifications as IHybrid['notifications'];
      };
      apply();
      loaded.changed.connect(apply);
    });
    return hybrid;
  }
};
