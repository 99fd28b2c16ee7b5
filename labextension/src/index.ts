/** The plugins: the panel with its commands, and what notebooks get. */

import { notebookPlugin } from './notebook';
import { panelPlugin } from './plugin';

export default [panelPlugin, notebookPlugin];
