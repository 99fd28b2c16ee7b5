/** Asks with what else a job is run again. */

import { Dialog, showDialog } from '@jupyterlab/apputils';
import type { TranslationBundle } from '@jupyterlab/translation';
import { Widget } from '@lumino/widgets';

import { memoryText, timeText } from './resources';
import type { IJob } from './types';

class ResourcesForm extends Widget implements Dialog.IBodyWidget<Record<string, string>> {
  constructor(job: IJob, trans: TranslationBundle) {
    super();
    this.addClass('jp-Hybrid-form');
    const more = (cause: string): number => (job.cause === cause ? 2 : 1);
    this.field(
      'memory',
      trans.__('Memory of each node'),
      job.memory === null ? '' : memoryText(job.memory * more('OUT_OF_MEMORY'))
    );
    this.field(
      'time',
      trans.__('Walltime'),
      job.time === null ? '' : timeText(job.time * more('TIMEOUT'))
    );
  }

  getValue(): Record<string, string> {
    const given = Object.entries(this.inputs).map(([name, input]) => [name, input.value.trim()]);
    return Object.fromEntries(given.filter(([, value]) => value));
  }

  private field(name: string, label: string, value: string): void {
    const input = document.createElement('input');
    input.className = 'jp-mod-styled';
    input.value = value;
    const around = document.createElement('label');
    around.append(label, input);
    this.node.append(around);
    this.inputs[name] = input;
  }

  private readonly inputs: Record<string, HTMLInputElement> = {};
}

/** Return the resources that the user asks for; null if the user lets it be. What ran out is doubled. */
export async function askResources(
  job: IJob,
  trans: TranslationBundle
): Promise<Record<string, string> | null> {
  const answer = await showDialog({
    title: trans.__('Retry "%1" with', job.name.split('\n', 1)[0] || job.id),
    body: new ResourcesForm(job, trans),
    buttons: [Dialog.cancelButton(), Dialog.okButton({ label: trans.__('Retry') })]
  });
  return answer.button.accept ? answer.value : null;
}
