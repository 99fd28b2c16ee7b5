/** What states, causes and resources are called. */

import type { TranslationBundle } from '@jupyterlab/translation';

import type { JobState } from './types';

/** What a state is called. */
export function stateWord(state: JobState, held: boolean, trans: TranslationBundle): string {
  if (held && state === 'PENDING') {
    return trans.__('Held');
  }
  switch (state) {
    case 'NEW':
      return trans.__('New');
    case 'PENDING':
      return trans.__('Pending');
    case 'RUNNING':
      return trans.__('Running');
    case 'COMPLETED':
      return trans.__('Completed');
    case 'FAILED':
      return trans.__('Failed');
    case 'CANCELLED':
      return trans.__('Cancelled');
    case 'TIMEOUT':
      return trans.__('Timed out');
    default:
      return trans.__('Unknown');
  }
}

/** What a task's state is called. */
export function taskWord(letter: string, trans: TranslationBundle): string {
  switch (letter) {
    case 'r':
      return trans.__('running');
    case 'd':
      return trans.__('done');
    case 'f':
      return trans.__('failed');
    case 'l':
      return trans.__('lost');
    case 'c':
      return trans.__('cancelled');
    default:
      return trans.__('waiting');
  }
}

/** What a cause of a bad end is called. */
export function causeWord(cause: string, trans: TranslationBundle): string {
  switch (cause) {
    case 'USER_ERROR':
      return trans.__('Error in the code');
    case 'OUT_OF_MEMORY':
      return trans.__('Out of memory');
    case 'TIMEOUT':
      return trans.__('Out of time');
    case 'NODE_FAILURE':
      return trans.__('Node failed');
    case 'PREEMPTED':
      return trans.__('Preempted');
    case 'CANCELLED':
      return trans.__('Cancelled');
    case 'DEPENDENCY_FAILED':
      return trans.__('A job before it failed');
    case 'SUBMIT_REJECTED':
      return trans.__('Rejected by the scheduler');
    case 'RESULT_LOST':
      return trans.__('Result lost');
    case 'INFRASTRUCTURE':
      return trans.__('Fault of the pool');
    default:
      return cause;
  }
}

/** What a resource is called that a job asks for. */
export function resourceWord(name: string, trans: TranslationBundle): string {
  switch (name) {
    case 'nodes':
      return trans.__('Nodes');
    case 'tasks_per_node':
      return trans.__('Tasks per node');
    case 'gpus':
      return trans.__('GPUs per node');
    case 'partition':
      return trans.__('Partition');
    case 'qos':
      return trans.__('QOS');
    case 'account':
      return trans.__('Account');
    case 'constraint':
      return trans.__('Constraint');
    case 'priority':
      return trans.__('Priority');
    case 'extra':
      return trans.__('Extra');
    default:
      return name;
  }
}
