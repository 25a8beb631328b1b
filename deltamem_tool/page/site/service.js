// Keeps the page's own files for visits without a network. The model and its runtime are kept by the page itself.

const SHELL = []; // written here when the page is made
const VERSION = "";
const PREFIX = `deltamem-page ${registration.scope} `;
const CACHE = PREFIX + VERSION;

addEventListener("install", (event) => {
  const requests = SHELL.map((path) => new Request(path, { cache: "no-cache" }));
  const kept = caches.open(CACHE).then((cache) => cache.addAll(requests));
  event.waitUntil(kept.then(() => skipWaiting())); // the next visit has the new page, whole as this one is by now
});

addEventListener("activate", (event) => {
  const isOlder = (name) => name.startsWith(PREFIX) && name !== CACHE;
  event.waitUntil(caches.keys().then((names) => Promise.all(names.filter(isOlder).map((name) => caches.delete(name)))));
});

addEventListener("fetch", (event) => {
  const { request } = event;
  const path = new URL(request.url);
  if (request.method !== "GET" || path.origin !== location.origin) return;
  event.respondWith(
    caches
      .open(CACHE)
      .then((cache) => cache.match(request, { ignoreSearch: true }))
      .then((kept) => kept ?? fetch(request)),
  );
});
