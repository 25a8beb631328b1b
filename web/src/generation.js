// Generates answers token by token, as in deltamem_tool/chat/generation.py.

import { TextStream } from "./text.js";

/** Why an answer ended. */
export const [STOP_TOKEN, STOP_STRING, LENGTH, INTERRUPTED] = ["stop token", "stop string", "length", "interrupted"];

/**
 * A token, whether it writes or belongs to a segment, and whether it ends one.
 *
 * @typedef {{ id: number, writes: boolean, ends: boolean }} Token
 *
 * @typedef {object} Answer
 * @property {string} text without the stop token or stop string
 * @property {number[]} tokens generated tokens, including a stop token or the last token of a stop string
 * @property {"stop token" | "stop string" | "length" | "interrupted"} why the answer ended
 *
 * @typedef {object} AnswerResult
 * @property {Answer} answer
 * @property {number[]} answerTokens tokens of the answer in the context, fed or not
 * @property {import("./model.js").Past} past
 * @property {Token[]} tokens tokens of prompt and answer that are in the past
 * @property {Token[]} pending tokens that are not fed yet
 */

/** The text of an answer while it is generated. Text that may become a stop string is held back. */
export class AnswerStream {
  /**
   * @param {import("./text.js").ChatText} text
   * @param {string[]} stop stop strings; the answer ends before the first one
   * @param {(piece: string) => void} onText
   */
  constructor(text, stop, onText) {
    this._stream = new TextStream(text);
    this._stop = stop;
    this._onText = onText;
    this._held = "";
    this.text = ""; // the text so far
  }

  /** Add a token, and return whether it completes a stop string. Nothing may follow in that case. */
  push(token) {
    return this._add(this._stream.push(token));
  }

  /** Release the text that was held back: no token follows. */
  end() {
    if (!this._add(this._stream.flush())) this._emit(this._held);
  }

  _add(piece) {
    const text = this._held + piece;
    const starts = this._stop.map((stop) => text.indexOf(stop)).filter((start) => start >= 0);
    if (starts.length) {
      this._held = "";
      this._emit(text.slice(0, Math.min(...starts)));
      return true;
    }
    let keep = 0;
    while (keep < text.length && !this._stop.some((stop) => stop.startsWith(text.slice(keep)))) keep++;
    this._held = text.slice(keep);
    this._emit(text.slice(0, keep));
    return false;
  }

  _emit(piece) {
    if (!piece) return;
    this.text += piece;
    this._onText(piece);
  }
}

/**
 * Feed a prompt and generate the answer.
 *
 * @param {import("./model.js").WebModel} model
 * @param {object} start
 * @param {import("./model.js").Past} start.past
 * @param {number} start.length number of tokens in the past
 * @param {Token[]} start.prompt
 * @param {boolean} start.answerWrites
 * @param {number} start.limit maximum length of the answer, in tokens
 * @param {import("./sampling.js").Sampler} sampler
 * @param {AnswerStream} stream
 * @param {AbortSignal} [signal] ends the answer; the text so far is kept
 * @returns {Promise<AnswerResult>}
 * @throws {DOMException} the signal was aborted before the prompt was fed
 * @throws {Error} a call of the model failed, or its logits contain NaN
 */
export async function answerPrompt(model, { past, length, prompt, answerWrites, limit }, sampler, stream, signal) {
  const tokens = [...prompt];
  const start = past;
  let fedCount = 0;
  let last = []; // the token that ended the answer, which is not fed
  let why = INTERRUPTED;
  try {
    while (why === INTERRUPTED) {
      if (fedCount === 0) signal?.throwIfAborted();
      const output = await model.step(past, length + fedCount, tokens.slice(fedCount));
      if (past !== start) model.release([past]);
      [past, fedCount] = [output.past, tokens.length];
      const id = sampler.pick(output.logits);
      if (model.stopTokens.has(id)) {
        [last, why] = [[id], STOP_TOKEN];
        stream.end();
      } else if (stream.push(id)) {
        [last, why] = [[id], STOP_STRING];
      } else {
        tokens.push({ id, writes: answerWrites, ends: false });
        if (tokens.length - prompt.length >= limit) {
          stream.end();
          why = LENGTH;
        }
      }
      await yieldToEventLoop();
      if (signal?.aborted && why === INTERRUPTED) {
        stream.end();
        break;
      }
    }
  } catch (error) {
    if (past !== start) model.release([past]);
    throw error;
  }
  const answerTokens = tokens.slice(prompt.length).map(({ id }) => id);
  const answer = { text: stream.text, tokens: [...answerTokens, ...last], why };
  return { answer, answerTokens, past, tokens: tokens.slice(0, fedCount), pending: tokens.slice(fedCount) };
}

// Lets the page render and handle messages, since a call of the model blocks the thread. (A timer would wait 4 ms.)
function yieldToEventLoop() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
