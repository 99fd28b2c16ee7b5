/** What the plugins share. */

import type { TranslationBundle } from '@jupyterlab/translation';
import { Token } from '@lumino/coreutils';

import type { HybridModel } from './model';

export interface IHybrid {
  readonly model: HybridModel;
  readonly trans: TranslationBundle;
  /** What the settings say is offered first; empty: the pool that the configuration calls the default. */
  defaultPool: string;
  /** Which ends of jobs are told of. */
  notifications: 'all' | 'failed' | 'none';
}

export const IHybrid = new Token<IHybrid>('jupyter-hybrid:IHybrid', 'Jobs on all pools.');
