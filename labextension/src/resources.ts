/** Resources as the magics and the server take them. */

/** Return memory as it is asked for: `400M`. */
export function memoryText(bytes: number): string {
  const [gigabytes, megabytes] = [bytes / 2 ** 30, bytes / 2 ** 20];
  return Number.isInteger(gigabytes) ? `${gigabytes}G` : `${Math.ceil(megabytes)}M`;
}

/** Return a walltime as it is asked for: `90min`. */
export function timeText(seconds: number): string {
  return seconds % 3600 === 0 ? `${seconds / 3600}h` : `${Math.ceil(seconds / 60)}min`;
}
