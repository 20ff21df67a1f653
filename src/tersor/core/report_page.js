"use strict";
const root = document.documentElement;
const keep = (name, value) => { try { localStorage.setItem("tersor-" + name, value); } catch { /* a file may have no storage */ } };
const kept = (name) => { try { return localStorage.getItem("tersor-" + name); } catch { return null; } };
const hints = new Map([...document.querySelectorAll("figcaption")].map((caption) => [caption, [...caption.childNodes]]));
const points = document.querySelectorAll(".point");

function speak(lang) {
  root.dataset.lang = lang;
  root.lang = lang === "zh" ? "zh-CN" : "en";
  document.title = root.dataset["title" + (lang === "zh" ? "Zh" : "En")];
  for (const point of points) {
    const text = point.dataset[lang];
    point.setAttribute("aria-label", text);
    point.querySelector("title").textContent = text;
  }
  for (const [caption, hint] of hints) caption.replaceChildren(...hint);
}

function light(theme) {
  root.dataset.theme = theme;
}

const wanted = new URLSearchParams(location.search);
speak(wanted.get("lang") || kept("lang") || (navigator.language.startsWith("zh") ? "zh" : "en"));
const theme = wanted.get("theme") || kept("theme");
if (theme) light(theme);

document.getElementById("language").addEventListener("click", () => {
  const lang = root.dataset.lang === "zh" ? "en" : "zh";
  speak(lang);
  keep("lang", lang);
});
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  light(dark ? "light" : "dark");
  keep("theme", dark ? "light" : "dark");
});
for (const point of points) {
  const caption = point.closest("figure").querySelector("figcaption");
  const show = () => { caption.textContent = point.dataset[root.dataset.lang]; };
  point.addEventListener("mouseenter", show);
  point.addEventListener("focus", show);
}
