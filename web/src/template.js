// Finds what a chat template writes, and where. A port of deltamem_tool/segments/template.py for contents that are text.

import { checkUnicode, isBlank } from "./characters.js";
import { DataError, ExportError, firstLine } from "./errors.js";
import { isObject } from "./json.js";

/** @typedef {{ role: string, content: string }} Message */

const PRIVATE_USE = 0xe000; // the first of the private-use characters, which have no meaning
const LAST_PRIVATE_USE = 0xf8ff;
const PROBES = [["user"], ["user", "assistant"], ["system"]]; // roles before a message whose header is learned
const BYTE_ORDER_MARK = /^\ufeff/;
const said = (number) => `\ue100${number}\ue101`; // in place of a content

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
    this._takesText = this._writesText();
  }

  // Whether to pass contents as text. Only a template that leaves out text and writes lists of texts gets lists.
  _writesText() {
    const sentinel = String.fromCharCode(PRIVATE_USE);
    const writes = (content) =>
      Boolean(this._attempt(() => this._written([{ role: "user", content }]))?.includes(sentinel));
    return writes(sentinel) || !writes([{ type: "text", text: sentinel }]);
  }

  /**
   * Render messages.
   *
   * @param {Message[]} messages
   * @throws {ExportError} the template rejects the messages
   * @throws {DataError} a message has no role or no text, or the template leaves out a content
   */
  render(messages, generationPrompt = false) {
    checkMessages(messages);
    const text = this._rendered(messages, generationPrompt);
    this._checkComplete(messages);
    return text;
  }

  _rendered(messages, generationPrompt = false) {
    const parts = (message) => ({ ...message, content: [{ type: "text", text: message.content }] });
    const text = this._written(this._takesText ? messages : messages.map(parts), generationPrompt);
    checkUnicode(text, "The conversation");
    return text;
  }

  _written(messages, generationPrompt = false) {
    try {
      return this._write(structuredClone(messages), generationPrompt).replace(BYTE_ORDER_MARK, "");
    } catch (error) {
      const change = "Change the roles or their order.";
      throw new ExportError("The chat template refuses the messages.", `${firstLine(error)}.`, change);
    }
  }

  _attempt(render) {
    try {
      return render();
    } catch (error) {
      if (error instanceof ExportError || error instanceof DataError) return null;
      throw error;
    }
  }

  /** Return the rendering, or null if there is an error. */
  attempt(messages) {
    return this._attempt(() => this._rendered(messages));
  }

  _checkComplete(messages) {
    const shape = JSON.stringify(messages.map(({ role, content }) => [role, content !== ""]));
    if (this._complete.has(shape)) return;
    const text = this.attempt(messages.map(probe));
    if (text !== null) {
      const missing = messages.findIndex(({ content }, number) => content !== "" && !text.includes(said(number)));
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
    const text = this.attempt(messages.map(probe));
    if (text === null || text.split(said(index)).length !== 2) return false;
    const [, after] = text.split(said(index));
    return messages.every(
      ({ role, content }, number) =>
        content === "" || ["system", "developer"].includes(role) || after.includes(said(number)) === number > index,
    );
  }

  /**
   * Find the content of message `index` in `text`, the rendering of `messages`.
   *
   * @returns {{ before: string, after: string } | null} the text before and after it
   */
  content(messages, index, text) {
    const sentinel = unusedIn(text);
    const other = this.attempt(messages.with(index, { ...messages[index], content: sentinel }))?.split(sentinel);
    if (other?.length !== 2) return null;
    const [before, after] = other;
    return text.startsWith(before) ? { before, after } : null;
  }

  /** Return the text that the template writes after an answer: the last one, or else an earlier one. */
  closing() {
    const talk = ["user", "assistant", "user"].map((role) => ({ role, content: "" }));
    for (const messages of [talk.slice(0, 2), talk]) {
      const text = this.attempt(messages);
      const place = text === null ? null : this.content(messages, 1, text);
      if (place !== null && !isBlank(place.after)) return place.after;
    }
    return "";
  }

  /** Return the role's header: the one known header that `before`, the text before the content, ends with; or null. */
  header(message, before) {
    const { role } = message;
    if (!this._headers.has(role)) this._headers.set(role, this._learned(role));
    const matches = [...this._headers.get(role)].filter((header) => before.endsWith(header));
    if (matches.length) return matches.length === 1 ? matches[0] : null;
    const opening = this.opening(message);
    return opening !== null && before.endsWith(opening) ? opening : null;
  }

  // The headers of messages of a role in short conversations, each the beginning of a longer one.
  _learned(role) {
    const [context, sentinel] = [String.fromCharCode(PRIVATE_USE), String.fromCharCode(PRIVATE_USE + 1)];
    const headers = new Set();
    for (const roles of PROBES) {
      const earlier = roles.map((role) => ({ role, content: context }));
      const start = this.attempt(earlier);
      const text = this.attempt([...earlier, { role, content: sentinel }]);
      if (start === null || text === null || !text.startsWith(start) || text.split(sentinel).length !== 2) continue;
      const header = text.slice(start.length, text.indexOf(sentinel));
      // Otherwise the template writes another message's content within this one.
      if (!header.includes(context)) headers.add(header);
    }
    return headers;
  }

  /** Return the text before the content of such a message at the beginning of a conversation. */
  opening({ role }) {
    const sentinel = String.fromCharCode(PRIVATE_USE);
    const parts = this.attempt([{ role, content: sentinel }])?.split(sentinel);
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

function unusedIn(text) {
  for (let code = PRIVATE_USE; code <= LAST_PRIVATE_USE; code++) {
    if (!text.includes(String.fromCharCode(code))) return String.fromCharCode(code);
  }
  throw new DataError("The conversation contains every private-use character.", "", "Leave one out.");
}

const probe = (message, number) => (message.content ? { ...message, content: said(number) } : message);
