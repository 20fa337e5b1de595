"use strict";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

fetch("openapi.json").then((response) => response.json()).then((api) => {
  const found = (schema) => schema && schema.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema || {};

  // a body that could be sent: required fields, and the defaults of the others
  function example(schema) {
    schema = found(schema);
    if (schema.default !== undefined) return schema.default;
    if (schema.anyOf) return example(schema.anyOf[0]);
    if (schema.enum) return schema.enum[0];
    if (schema.type === "object" || schema.properties) {
      return Object.fromEntries(Object.entries(schema.properties || {}).filter(([name]) => (schema.required || []).includes(name) || ["k", "text"].includes(name))
        .map(([name, part]) => [name, name === "text" ? "red" : example(part)]));
    }
    if (schema.type === "array") return [example(schema.items)];
    return { integer: 1, number: 1, string: "red", boolean: false }[schema.type] ?? null;
  }

  function fields(schema) {
    const rows = Object.entries(found(schema).properties || {}).map(([name, part]) => {
      const kinds = (part.anyOf || [part]).map((one) => one.type || (one.$ref ? one.$ref.split("/").pop() : "any"));
      const bounds = ["minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"].filter((key) => part[key] !== undefined).map((key) => `${key} ${part[key]}`);
      return make("li", {}, make("code", {}, name), ` ${[...new Set(kinds)].join(" or ")}${bounds.length ? `, ${bounds.join(", ")}` : ""}${part.description ? `: ${part.description}` : ""}`);
    });
    return make("ul", {}, ...rows);
  }

  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, call] of Object.entries(methods)) {
      const body = call.requestBody && call.requestBody.content["application/json"];
      const upload = call.requestBody && !body;
      const answer = make("pre", { hidden: "" });
      const send = make("button", { type: "submit" }, "Send");
      const form = make("form", {}, send);
      const inputs = (call.parameters || []).map((parameter) => {
        const input = make("input", { name: parameter.name, placeholder: parameter.name, "aria-label": parameter.name });
        form.prepend(input);
        return input;
      });
      let text = null;
      if (body) { text = make("textarea", { rows: "6", "aria-label": "Body" }); text.value = JSON.stringify(example(body.schema), null, 2); form.prepend(text); }
      if (upload) { form.prepend(make("input", { type: "file", name: "picture" })); }
      form.addEventListener("submit", async (event) => {
        event.preventDefault();
        const query = new URLSearchParams(inputs.filter((input) => input.value).map((input) => [input.name, input.value]));
        const options = { method: method.toUpperCase() };
        if (body) { options.body = text.value; options.headers = { "Content-Type": "application/json" }; }
        if (upload) options.body = new FormData(form);
        const response = await fetch(path + (query.size ? `?${query}` : ""), options);
        const kind = response.headers.get("Content-Type") || "";
        answer.hidden = false;
        answer.textContent = `${response.status}\n` + (kind.includes("json") ? JSON.stringify(await response.json(), null, 2) : `${kind}, ${(await response.blob()).size} bytes`);
      });
      const schema = body ? body.schema : upload ? Object.values(call.requestBody.content)[0].schema : null;
      document.getElementById("paths").append(make("details", {},
        make("summary", {}, make("span", { class: "method" }, method.toUpperCase()), make("code", {}, path), ` ${call.summary}`),
        ...(schema ? [fields(schema)] : []), form, answer));
    }
  }
});
