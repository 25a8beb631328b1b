// Caches the page's own files for offline visits. The page itself caches the model and its runtime.

const SHELL = []; // installation in by `deltamem page`
const VERSION = "";
const PREFIX = `deltamem-page ${registration.scope} `;
const CACHE = PREFIX + VERSION;

addEventListener("install", (event) => {
  const requests = SHELL.map((path) => new Request(path, { cache: "no-cache" }));
  const installation = caches.open(CACHE).then((cache) => cache.addAll(requests));
  event.waitUntil(installation.then(() => skipWaiting())); // this page is loaded completely; the next visit gets the new one
});

addEventListener("activate", (event) => {
  const isOlder = (name) => name.startsWith(PREFIX) && name !== CACHE;
  event.waitUntil(caches.keys().then((names) => Promise.all(names.filter(isOlder).map((name) => caches.delete(name)))));
});

addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== location.origin) return;
  event.respondWith(
    caches
      .open(CACHE)
      .then((cache) => cache.match(request, { ignoreSearch: true }))
      .then((response) => response ?? fetch(request)),
  );
});
