"use strict";

function make(tag, text, parent) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

function limits(schema) {
  const kinds = schema.anyOf || [schema];
  const found = [];
  for (const kind of kinds) {
    if (kind.type === "null") continue;
    if (kind.enum) found.push(kind.enum.join(", "));
    else if (kind.minimum !== undefined && kind.maximum !== undefined) found.push(`${kind.minimum} to ${kind.maximum}`);
    else found.push(kind.type || "");
  }
  return found.join(" or ") + (schema.default !== undefined ? ` (default ${schema.default})` : "");
}

async function show() {
  const here = new URL(".", window.location.href).href;
  document.getElementById("example").textContent =
    `curl --data-binary @photo.jpg "${here}v1/models/NAME/translate?to=DOMAIN" -o drawing.png\n` +
    `curl ${here}v1/models`;
  const api = await (await fetch("openapi.json")).json();
  const parent = document.getElementById("routes");
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      make("h2", `${method.toUpperCase()} ${path}`, parent);
      make("p", route.description || route.summary, parent);
      if (!route.parameters) continue;
      const frame = make("div", "", parent);
      frame.className = "wide";
      const table = make("table", "", frame);
      for (const parameter of route.parameters) {
        const row = make("tr", "", table);
        make("th", parameter.name, row).scope = "row";
        make("td", limits(parameter.schema), row);
        make("td", parameter.description || parameter.schema.description || "", row);
      }
    }
  }
}

show();
