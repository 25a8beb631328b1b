/** Of deltamem-tool, whose files it reads and writes. */
export const VERSION = "0.1.0";
