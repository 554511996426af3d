document.title = visible(data.title) + " · run";
$("title").textContent = visible(data.title);
for (const [name, value] of Object.entries(data.config)) $("config").append(el("span", {}, name + " ", el("b", {}, value)));
if (data.notes.length) $("notes").textContent = visible("Not all is on this page: " + data.notes.join("; ") + ".");
drawCurves();
startSiblings();
