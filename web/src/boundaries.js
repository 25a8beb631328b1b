// Assigns the tokens of a chat to segments. A port of deltamem_tool/segments/boundaries.py, which explains the rules.

import { isBlank, trim, trimStart } from "./characters.js";
import { DataError } from "./errors.js";

/** The tag of one token, as in deltamem_tool/segments/tags.py. */
export const SegmentTag = Object.freeze({
  OUTSIDE: 0, // the token reads, and is never written
  INSIDE: 1, // the token belongs to a segment
  LAST: 2, // the token is the last of its segment, which is written here
});
const WITHOUT_TAGS = 'Or use granularity "token", which needs no boundaries.';

/**
 * Characters from the end of the span before this one up to `end`.
 *
 * @typedef {object} Span
 * @property {number} end
 * @property {boolean} belongs whether they belong to a segment
 * @property {string} segment the segment's name in errors, if it ends here
 */

/**
 * Split a rendering that ends with a generation prompt into spans, in order and without gaps.
 *
 * @param {import("./template.js").ChatTemplate} template
 * @param {import("./template.js").Message[]} messages
 * @param {string} text the rendering of the messages
 * @param {import("./sentences.js").Split | null} split splits a content into sentences; null keeps messages whole
 * @returns {Span[]}
 * @throws {DataError} the template does not show where a message ends
 */
export function spansOf(template, messages, text, split) {
  const body = template.render(messages);
  if (!text.startsWith(body)) {
    throw new DataError(
      `The chat template of ${template.name} renders the messages differently before a generation prompt.`,
      "",
      `Use another model. ${WITHOUT_TAGS}`,
    );
  }
  const bounds = boundsOf(template, messages, body);
  const spans = [{ end: bounds[0], belongs: false, segment: "" }];
  for (const [index, { role, content }] of messages.entries()) {
    const [start, end] = bounds.slice(index, index + 2);
    const name = nameOf(messages, index);
    if (role === "system") {
      spans.push({ end, belongs: false, segment: "" });
    } else if (split === null || isBlank(content)) {
      spans.push({ end, belongs: true, segment: name });
    } else {
      const starts = sentenceStarts(template, messages, index, body, start, end, split);
      for (const [number, first] of starts.entries()) {
        const following = starts[number + 1] ?? end;
        const excerpt = trim(body.slice(first, following)).slice(0, 60);
        spans.push({ end: following, belongs: true, segment: `sentence "${excerpt}" of ${name}` });
      }
    }
  }
  spans.push({ end: text.length, belongs: true, segment: "" }); // the generation prompt: a segment that stays open
  return spans;
}

// Where each message starts in `body`, and where the last one ends: one number more than messages.
function boundsOf(template, messages, body) {
  const first = messages[0].role === "system" ? null : template.preamble(messages[0], body);
  const bounds = [first ?? 0];
  for (let index = 1; index < messages.length; index++) {
    const bound = boundOf(template, messages, index, body);
    if (bound === null || bound < bounds.at(-1)) {
      throw new DataError(
        `The chat template of ${template.name} does not show where ${nameOf(messages, index - 1)} ends and ` +
          `${nameOf(messages, index)} starts.`,
        "It renders earlier messages differently when later ones follow, or not at all without them.",
        `Use a model whose template only appends messages. ${WITHOUT_TAGS}`,
      );
    }
    bounds.push(bound);
  }
  return [...bounds, body.length];
}

// Where message `index` starts and the one before it ends; null if the template does not show it.
function boundOf(template, messages, index, body) {
  const earlier = template.tryRender(messages.slice(0, index));
  if (earlier !== null && body.startsWith(earlier)) return earlier.length;
  const message = messages[index];
  const place = template.content(messages, index, body);
  const header = place === null ? null : template.header(message, place.before);
  if (header !== null) return place.before.length - header.length;
  const isAfterSystem = messages.slice(0, index).every(({ role }) => role === "system");
  return isAfterSystem ? template.preamble(message, body) : null; // their text is within this message
}

// Where in `body` the sentences of message `index`, `body.slice(start, end)`, start.
function sentenceStarts(template, messages, index, body, start, end, split) {
  const { begin, written } = writtenContent(template, messages, index, body, start, end);
  if (isBlank(written)) return [begin];
  const starts = [];
  let position = 0;
  for (const piece of split(written)) {
    const at = written.indexOf(piece, position);
    if (at < 0) {
      throw new DataError(`The split of ${nameOf(messages, index)} has a piece that is not in its text.`, "", WITHOUT_TAGS);
    }
    if (!isBlank(piece)) starts.push(begin + at);
    position = at + piece.length;
  }
  return starts;
}

// Where the content of message `index` begins, and the content as rendered.
function writtenContent(template, messages, index, body, start, end) {
  const place = template.content(messages, index, body);
  if (place !== null && body.endsWith(place.after)) {
    const [begin, stop] = [place.before.length, body.length - place.after.length];
    const isWithin = start <= begin && begin <= stop && stop <= end;
    const written = body.slice(begin, stop);
    if (isWithin && messages[index].content.includes(written)) return { begin, written };
  }
  throw new DataError(
    `The chat template of ${template.name} does not show where the content of ${nameOf(messages, index)} is.`,
    "The template changes the content, or what it writes around the content depends on it.",
    'Use an adapter of granularity "message".',
  );
}

/**
 * Return the tags of tokens with the character ranges `offsets`; byte-level tokens can share a character.
 *
 * @param {string} text
 * @param {[number, number][]} offsets start and end of each token in `text`, in UTF-16 units
 * @param {Span[]} spans
 * @returns {number[]} a `SegmentTag` for each token
 * @throws {DataError} a segment has no token of its own
 */
export function tagsOf(text, offsets, spans) {
  const owners = offsets.map(([start, end]) => spans.findIndex((span) => span.end > placeOf(text, start, end)));
  const tags = owners.map((owner) => (spans[owner].belongs ? SegmentTag.INSIDE : SegmentTag.OUTSIDE));
  for (const [index, { segment }] of spans.entries()) {
    if (!segment) continue;
    const last = owners.lastIndexOf(index);
    if (last < 0) {
      throw new DataError(
        `${segment[0].toUpperCase()}${segment.slice(1)} has no token of its own.`,
        "The template writes nothing for it, or its characters are in tokens of the text before or after it.",
        "Leave it out, or merge it with another.",
      );
    }
    tags[last] = SegmentTag.LAST;
  }
  return tags;
}

// The position of the character that decides the segment of the token at `text[start:end]`.
function placeOf(text, start, end) {
  const characters = text.slice(start, end);
  return isBlank(characters) ? Math.min(start, text.length - 1) : end - trimStart(characters).length;
}

const nameOf = (messages, index) => `message ${index + 1} (${messages[index].role})`;
