/** The panel as a Lab widget, in the side bar or in the main area. */

import { ReactWidget } from '@jupyterlab/apputils';
import React from 'react';

import { hybridIcon } from './icons';
import type { IViewContext } from './views/context';
import { ViewContext } from './views/context';
import { PanelView } from './views/panelview';

export class HybridPanel extends ReactWidget {
  constructor(private readonly view: IViewContext) {
    super();
    this.addClass('jp-Hybrid');
    this.title.icon = hybridIcon;
    this.title.caption = view.trans.__('Jobs on all pools');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', view.trans.__('Jobs'));
  }

  protected render(): JSX.Element {
    return (
      <ViewContext value={this.view}>
        <PanelView />
      </ViewContext>
    );
  }
}
