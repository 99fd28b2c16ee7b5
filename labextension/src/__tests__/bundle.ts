import type { TranslationBundle } from '@jupyterlab/translation';

/** Words as they stand in the code, or others for them. Lab's own bundle is an ES module, which jest does not load. */
export function bundle(words: Record<string, string> = {}): TranslationBundle {
  const __ = (text: string, ...values: unknown[]): string =>
    (words[text] ?? text).replace(/%(\d+)/g, (_, place) => String(values[place - 1]));
  return { __ } as TranslationBundle;
}
