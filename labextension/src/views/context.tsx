/** What every view may use: the model, the words, and what Lab can do. */

import type { JupyterFrontEnd } from '@jupyterlab/application';
import type { TranslationBundle } from '@jupyterlab/translation';
import type { CommandRegistry } from '@lumino/commands';
import type { ISignal } from '@lumino/signaling';
import React, { createContext, useContext, useEffect, useReducer, useState } from 'react';

import type { HybridModel } from '../model';

export interface IViewContext {
  model: HybridModel;
  trans: TranslationBundle;
  commands: CommandRegistry;
  contextMenu: JupyterFrontEnd['contextMenu'];
}

const Context = createContext<IViewContext | null>(null);

export const ViewContext = Context.Provider;

export function useView(): IViewContext {
  const context = useContext(Context);
  if (context === null) {
    throw new Error('a view stands outside of its panel');
  }
  return context;
}

/** Render again whenever a signal is emitted. */
export function useSignal<T>(signal: ISignal<T, void> | null | undefined): void {
  const [, again] = useReducer((count: number) => count + 1, 0);
  useEffect(() => {
    signal?.connect(again);
    return () => {
      signal?.disconnect(again);
    };
  }, [signal]);
}

/** The time in seconds since the epoch; it goes on while `running`. */
export function useNow(running: boolean): number {
  const [now, setNow] = useState(() => Date.now() / 1000);
  useEffect(() => {
    setNow(Date.now() / 1000);
    if (running) {
      const timer = window.setInterval(() => setNow(Date.now() / 1000), 1000);
      return () => window.clearInterval(timer);
    }
    return undefined;
  }, [running]);
  return now;
}

/** The size of an element, followed as it changes. */
export function useSize(ref: React.RefObject<HTMLElement>): { width: number; height: number } {
  const [size, setSize] = useState({ width: 0, height: 0 });
  useEffect(() => {
    const element = ref.current;
    if (!element) {
      return undefined;
    }
    const observer = new ResizeObserver(() => {
      const width = element.clientWidth;
      const height = element.clientHeight;
      setSize(old => (old.width === width && old.height === height ? old : { width, height }));
    });
    observer.observe(element);
    return () => observer.disconnect();
  }, [ref]);
  return size;
}
