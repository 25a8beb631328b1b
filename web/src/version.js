/** The version of deltamem-tool whose files this library reads and writes. */
export const VERSION = "0.1.0";
