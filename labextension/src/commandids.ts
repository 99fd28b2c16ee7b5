/** The names of the commands; views and menus run them by name. */

export namespace CommandIDs {
  export const openPanel = 'hybrid:open-panel';
  export const openDashboard = 'hybrid:open-dashboard';
  export const openJob = 'hybrid:open-job';
  export const refresh = 'hybrid:refresh';
  export const cancel = 'hybrid:cancel';
  export const retryFailed = 'hybrid:retry-failed';
  export const retryWith = 'hybrid:retry-with';
  export const retryAll = 'hybrid:retry-all';
  export const hold = 'hybrid:hold';
  export const release = 'hybrid:release';
  export const copyId = 'hybrid:copy-id';
  export const openFolder = 'hybrid:open-folder';
  export const openCell = 'hybrid:open-cell';
  export const loadResults = 'hybrid:load-results';
  export const cleanUp = 'hybrid:clean-up';
  export const runCellOn = 'hybrid:run-cell-on';
  export const setRunOn = 'hybrid:set-run-on';
}
