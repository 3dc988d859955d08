"use strict";

const $ = (id) => document.getElementById(id);
const state = { models: [], file: null, asked: 0, beforeUrl: null, afterUrl: null };

function token() {
  return sessionStorage.getItem("i2i-token") || "";
}

async function ask(path, options = {}) {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("token-form").hidden = false;
    if (!token()) throw new Error("");
    throw new Error("This is not the token of this server.");
  }
  let detail = null;
  try {
    detail = (await answer.json()).error;
  } catch { /* not from us: a proxy's own page */ }
  if (!detail) throw new Error(`The server answered ${answer.status}.`);
  const text = detail.hint ? `${detail.message}: ${detail.hint}` : detail.message;
  throw new Error(`${text[0].toUpperCase()}${text.slice(1)} (${detail.code})`);
}

function showError(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error || !error.message;
  if (error) $("status").textContent = "";
}

function option(text, value) {
  const element = document.createElement("option");
  element.textContent = text;
  element.value = value;
  return element;
}

function currentModel() {
  return state.models.find((model) => model.name === $("model").value);
}

function currentDirection() {
  const model = currentModel();
  const directions = (model && model.conditioning.directions) || [];
  return directions[Number($("direction").value)] || null;
}

async function loadModels() {
  try {
    const answer = await ask("v1/models");
    state.models = (await answer.json()).models;
  } catch (error) {
    return showError(error);
  }
  showError(null);
  $("token-form").hidden = true;
  const select = $("model");
  const chosen = select.value;
  select.replaceChildren(...state.models.map((model) => {
    const note = model.ready ? model.system : model.reason || "not ready";
    const element = option(model.name === note ? note : `${model.name} (${note})`, model.name);
    element.disabled = !model.ready;
    return element;
  }));
  if (state.models.some((model) => model.name === chosen && model.ready)) select.value = chosen;
  else if (state.models.some((model) => model.ready)) select.value = state.models.find((model) => model.ready).name;
  select.disabled = !state.models.some((model) => model.ready);
  showDirections();
  if (select.disabled) {
    $("status").textContent = "The models are loading…";
    setTimeout(loadModels, 2000);
  } else {
    $("status").textContent = "";
    if (state.file && !state.afterUrl) translate();
  }
}

function showDirections() {
  const model = currentModel();
  const directions = (model && model.conditioning.directions) || [];
  $("direction").replaceChildren(...directions.map((d, i) => option(`${d.source} → ${d.to}`, String(i))));
  $("direction").disabled = directions.length < 2;
}

function setImage(element, key, blob) {
  if (state[key]) URL.revokeObjectURL(state[key]);
  state[key] = URL.createObjectURL(blob);
  element.onload = () => element.classList.toggle("small", element.naturalWidth < 200);
  element.src = state[key];
}

function take(file) {
  if (!file) return;
  state.file = file;
  setImage($("before"), "beforeUrl", file);
  translate();
}

async function translate() {
  const model = currentModel();
  const direction = currentDirection();
  if (!state.file || !model || !direction) return;
  // Only the answer to the latest question is shown.
  const asked = ++state.asked;
  if (state.abort) state.abort.abort();
  state.abort = new AbortController();
  showError(null);
  $("before-name").textContent = `Before: ${direction.source}`;
  $("after-name").textContent = `After: ${direction.to}`;
  $("pair").hidden = false;
  $("after").hidden = !state.afterUrl;
  $("waiting").hidden = false;
  $("status").textContent = "Translating…";
  const began = performance.now();
  const query = new URLSearchParams({ source: direction.source, to: direction.to });
  try {
    const answer = await ask(`v1/models/${encodeURIComponent(model.name)}/translate?${query}`,
      { method: "POST", body: state.file, signal: state.abort.signal });
    const image = await answer.blob();
    if (asked !== state.asked) return;
    setImage($("after"), "afterUrl", image);
    $("after").hidden = false;
    $("after").alt = `the image, translated from ${direction.source} to ${direction.to}`;
    $("download").href = state.afterUrl;
    $("download").download = `${state.file.name ? state.file.name.replace(/\.[^.]*$/, "") : "image"}-${direction.to}.png`;
    const resized = answer.headers.get("X-Resized") ? "; resized for the network and back" : "";
    $("facts").textContent = `${model.name}, version ${answer.headers.get("X-Model-Version")}; ` +
      `${Math.round(performance.now() - began)} ms${resized}`;
    $("actions").hidden = false;
    $("status").textContent = "Done.";
  } catch (error) {
    if (asked !== state.asked || error.name === "AbortError") return;
    showError(error);
    $("pair").hidden = true;
    $("actions").hidden = true;
  } finally {
    if (asked === state.asked) $("waiting").hidden = true;
  }
}

$("model").addEventListener("change", () => { showDirections(); translate(); });
$("direction").addEventListener("change", translate);
$("file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
$("choices").addEventListener("submit", (event) => event.preventDefault());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("i2i-token", $("token").value.trim());
  loadModels().then(translate);
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take([...event.dataTransfer.files].find((file) => file.type.startsWith("image/"))
      || event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
loadModels();
