// Finds what a chat template writes, and where. A port of deltamem_tool/segments/template.py for contents that are text.

import { checkUnicode, isBlank } from "./characters.js";
import { DataError, ExportError, firstLine } from "./errors.js";
import { isObject } from "./json.js";

/**
 * @typedef {{ role: string, content: string }} Message
 *
 * @typedef {object} Content the text of a rendering before and after a message's content
 * @property {string} before
 * @property {string} after
 */

const [FIRST_PRIVATE_USE, LAST_PRIVATE_USE] = [0xe000, 0xf8ff]; // characters without a meaning
const PROBES = [["user"], ["user", "assistant"], ["system"]]; // roles before a message whose header is learned
const BYTE_ORDER_MARK = /^\ufeff/;
const contentSentinel = (number) => `\ue100${number}\ue101`; // in place of a content

/** @throws {DataError} there is no message, or a message has no role or no text */
export function checkMessages(messages) {
  if (!Array.isArray(messages) || !messages.length) {
    throw new DataError("The conversation has no messages.", "", "Pass a list of { role, content }.");
  }
  for (const [number, message] of messages.entries()) {
    const lacks = ["role", "content"].find((part) => !isObject(message) || typeof message[part] !== "string");
    if (lacks) throw new DataError(`Message ${number + 1} has no text as its ${lacks}.`, "", "Correct the message.");
  }
}

/** A chat template, and where it writes messages, as found by rendering. */
export class ChatTemplate {
  /**
   * @param {string} name for errors
   * @param {(messages: object[], generationPrompt: boolean) => string} write renders messages; it may throw any exception
   */
  constructor(name, write) {
    this.name = name;
    this._write = write;
    this._headers = new Map();
    this._complete = new Set(); // shapes of conversations that are written completely
    this._takesText = this._detectTextSupport();
  }

  // Whether to pass contents as text. Only a template that leaves out text and writes lists of texts gets lists.
  _detectTextSupport() {
    const sentinel = String.fromCharCode(FIRST_PRIVATE_USE);
    const writes = (content) =>
      Boolean(nullOnError(() => this._renderRaw([{ role: "user", content }]))?.includes(sentinel));
    return writes(sentinel) || !writes([{ type: "text", text: sentinel }]);
  }

  /**
   * Render messages.
   *
   * @param {Message[]} messages
   * @param {boolean} [generationPrompt] whether to end with the header of the assistant's next message
   * @returns {string}
   * @throws {ExportError} the template rejects the messages
   * @throws {DataError} a message has no role or no text, or the template leaves out a content
   */
  render(messages, generationPrompt = false) {
    checkMessages(messages);
    const text = this._renderUnchecked(messages, generationPrompt);
    this._checkComplete(messages);
    return text;
  }

  _renderUnchecked(messages, generationPrompt = false) {
    const withParts = (message) => ({ ...message, content: [{ type: "text", text: message.content }] });
    const text = this._renderRaw(this._takesText ? messages : messages.map(withParts), generationPrompt);
    checkUnicode(text, "The conversation");
    return text;
  }

  _renderRaw(messages, generationPrompt = false) {
    try {
      return this._write(structuredClone(messages), generationPrompt).replace(BYTE_ORDER_MARK, "");
    } catch (error) {
      const change = "Change the roles or their order.";
      throw new ExportError("The chat template refuses the messages.", `${firstLine(error)}.`, change);
    }
  }

  /** Return the rendering, or null if there is an error. */
  tryRender(messages) {
    return nullOnError(() => this._renderUnchecked(messages));
  }

  _checkComplete(messages) {
    const shape = JSON.stringify(messages.map(({ role, content }) => [role, content !== ""]));
    if (this._complete.has(shape)) return;
    const text = this.tryRender(messages.map(probe));
    if (text !== null) {
      const missing = messages.findIndex(({ content }, number) => content !== "" && !text.includes(contentSentinel(number)));
      if (missing >= 0) {
        throw new DataError(
          `The chat template of ${this.name} leaves out message ${missing + 1} (${messages[missing].role}).`,
          "The rendered text does not contain its content.",
          "Leave the message out or change its role, or use a model whose template writes it.",
        );
      }
    }
    this._complete.add(shape);
  }

  /** Whether the template writes all later contents, and no earlier ones, after the content of message `index`. */
  continues(messages, index) {
    const text = this.tryRender(messages.map(probe));
    if (text === null || text.split(contentSentinel(index)).length !== 2) return false;
    const [, after] = text.split(contentSentinel(index));
    return messages.every(
      ({ role, content }, number) =>
        content === "" || ["system", "developer"].includes(role) || after.includes(contentSentinel(number)) === number > index,
    );
  }

  /**
   * Find the content of message `index` in `text`, the rendering of `messages`.
   *
   * @returns {Content | null} null if the template does not show where it is
   */
  content(messages, index, text) {
    const sentinel = unusedCharacter(text);
    const parts = this.tryRender(messages.with(index, { ...messages[index], content: sentinel }))?.split(sentinel);
    if (parts?.length !== 2) return null;
    const [before, after] = parts;
    return text.startsWith(before) ? { before, after } : null;
  }

  /** Return the text that the template writes after an answer: the last one, or else an earlier one. */
  closing() {
    const exchange = ["user", "assistant", "user"].map((role) => ({ role, content: "" }));
    for (const messages of [exchange.slice(0, 2), exchange]) {
      const text = this.tryRender(messages);
      const place = text === null ? null : this.content(messages, 1, text);
      if (place !== null && !isBlank(place.after)) return place.after;
    }
    return "";
  }

  /** Return the role's header: the one known header that `before`, the text before the content, ends with; or null. */
  header(message, before) {
    const { role } = message;
    if (!this._headers.has(role)) this._headers.set(role, this._learnHeaders(role));
    const matches = [...this._headers.get(role)].filter((header) => before.endsWith(header));
    if (matches.length) return matches.length === 1 ? matches[0] : null;
    const opening = this.opening(message);
    return opening !== null && before.endsWith(opening) ? opening : null;
  }

  // Returns the headers of messages of a role in short conversations, each the beginning of a longer one.
  _learnHeaders(role) {
    const [context, sentinel] = [String.fromCharCode(FIRST_PRIVATE_USE), String.fromCharCode(FIRST_PRIVATE_USE + 1)];
    const headers = new Set();
    for (const roles of PROBES) {
      const earlier = roles.map((role) => ({ role, content: context }));
      const start = this.tryRender(earlier);
      const text = this.tryRender([...earlier, { role, content: sentinel }]);
      if (start === null || text === null || !text.startsWith(start) || text.split(sentinel).length !== 2) continue;
      const header = text.slice(start.length, text.indexOf(sentinel));
      // Otherwise the template writes another message's content within this one.
      if (!header.includes(context)) headers.add(header);
    }
    return headers;
  }

  /** Return the text before the content of such a message at the beginning of a conversation. */
  opening({ role }) {
    const sentinel = String.fromCharCode(FIRST_PRIVATE_USE);
    const parts = this.tryRender([{ role, content: sentinel }])?.split(sentinel);
    return parts?.length === 2 ? parts[0] : null;
  }

  /**
   * Return the length of the text that the template writes before any message; null unless `text` starts with it, followed
   * by the header of `message`.
   */
  preamble(message, text) {
    const opening = this.opening(message);
    const header = opening === null ? null : this.header(message, opening);
    return header === null || !text.startsWith(opening) ? null : opening.length - header.length;
  }
}

function unusedCharacter(text) {
  for (let code = FIRST_PRIVATE_USE; code <= LAST_PRIVATE_USE; code++) {
    if (!text.includes(String.fromCharCode(code))) return String.fromCharCode(code);
  }
  throw new DataError("The conversation contains every private-use character.", "", "Leave one out.");
}

function nullOnError(render) {
  try {
    return render();
  } catch (error) {
    if (error instanceof ExportError || error instanceof DataError) return null;
    throw error;
  }
}

const probe = (message, number) => (message.content ? { ...message, content: contentSentinel(number) } : message);
