// NumPy's `default_rng(seed).random()`: PCG64 seeded by a SeedSequence. The same seed draws the same numbers.

const [WORD, DOUBLE_WORD, QUAD_WORD] = [2n ** 32n - 1n, 2n ** 64n - 1n, 2n ** 128n - 1n];
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL_WORDS = 4; // 32-bit words of the SeedSequence

/** A generator of random numbers. */
export class Random {
  /** @param {number | null} seed a non-negative integer; null for a random seed */
  constructor(seed) {
    const entropy = seed === null ? [...crypto.getRandomValues(new Uint32Array(POOL_WORDS))] : wordsOf(BigInt(seed));
    const [high, low, incrementHigh, incrementLow] = seedWords(entropy);
    this._increment = ((((incrementHigh << 64n) | incrementLow) << 1n) | 1n) & QUAD_WORD;
    this._state = 0n;
    this._step();
    this._state = (this._state + ((high << 64n) | low)) & QUAD_WORD;
    this._step();
  }

  /** Return the next number in [0, 1), with 53 random bits. */
  next() {
    this._step();
    const folded = (this._state >> 64n) ^ (this._state & DOUBLE_WORD);
    const rotation = this._state >> 122n;
    const bits = ((folded >> rotation) | (folded << (64n - rotation))) & DOUBLE_WORD;
    return Number(bits >> 11n) / 2 ** 53;
  }

  _step() {
    this._state = (this._state * MULTIPLIER + this._increment) & QUAD_WORD;
  }
}

function wordsOf(number) {
  const words = [];
  for (; number > 0n; number >>= 32n) words.push(Number(number & WORD));
  return words.length ? words : [0];
}

// Four 64-bit numbers, as NumPy's SeedSequence generates them.
function seedWords(entropy) {
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value = (value ^ constant) >>> 0;
    constant = Math.imul(constant, 0x931e8875) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const mixed = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) >>> 0;
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
  const pool = Array.from({ length: POOL_WORDS }, (_, index) => hash(entropy[index] ?? 0));
  for (let source = 0; source < POOL_WORDS; source++) {
    for (let target = 0; target < POOL_WORDS; target++) {
      if (source !== target) pool[target] = mix(pool[target], hash(pool[source]));
    }
  }
  for (const word of entropy.slice(POOL_WORDS)) {
    for (let target = 0; target < POOL_WORDS; target++) pool[target] = mix(pool[target], hash(word));
  }
  constant = 0x8b51f9dd;
  const words = Array.from({ length: 2 * POOL_WORDS }, (_, index) => {
    let value = (pool[index % POOL_WORDS] ^ constant) >>> 0;
    constant = Math.imul(constant, 0x58f38ded) >>> 0;
    value = Math.imul(value, constant) >>> 0;
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return Array.from({ length: POOL_WORDS }, (_, index) => words[2 * index] | (words[2 * index + 1] << 32n));
}
