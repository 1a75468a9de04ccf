// The photos that an adapter is taught from: dropped or chosen, each with its crop and its caption.

import { byId, el, plural } from "./dom.js";

const TRAINED_ON = /\.(png|jpe?g|jfif|webp|avif|heic|heif|bmp|tiff?)$/i;
const CAPTION = /\.(txt|caption)$/i;
const MOST_CUT = 0.35; // of a photo, as `spec check` says it

let photos = []; // {name, file, url, caption, cut: share that the square crop leaves out, or null}
let changed = () => {};

export function setUpPhotos(onChange) {
  changed = onChange;
  const zone = byId("drop");
  byId("photo-files").addEventListener("change", (event) => {
    add([...event.target.files]);
    event.target.value = ""; // the same file may be chosen again
  });
  for (const kind of ["dragenter", "dragover"]) {
    zone.addEventListener(kind, (event) => {
      event.preventDefault();
      zone.dataset.over = "";
    });
  }
  for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, () => delete zone.dataset.over);
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
}

export const chosenPhotos = () => photos;

/** What is wrong with a caption, in words; null where nothing is. An empty one is the template's. */
export function captionFault(caption, token) {
  if (!caption.trim() || !token) return null;
  const found = new RegExp(
    `(^|[^\\p{L}\\p{N}])${token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}($|[^\\p{L}\\p{N}])`,
    "u",
  );
  return found.test(caption) ? null : `This caption lacks the token ${token}.`;
}

/** The members of the upload: photos and, where any caption is written, all captions. */
export function members(template) {
  const written = photos.some(({ caption }) => caption.trim());
  return photos.flatMap(({ name, file, caption }) => {
    const text = caption.trim() || template;
    return written
      ? [
          [name, file],
          [`${stem(name)}.txt`, new Blob([`${text}\n`], { type: "text/plain" })],
        ]
      : [[name, file]];
  });
}

export function forgetPhotos() {
  for (const { url } of photos) URL.revokeObjectURL(url);
  photos = [];
  show([]);
}

async function add(files) {
  const captions = new Map();
  const unused = [];
  for (const file of files) {
    if (CAPTION.test(file.name)) captions.set(stem(file.name), (await file.text()).trim());
    else if (!TRAINED_ON.test(file.name)) unused.push(`${file.name} is no photo`);
    else if (photos.some(({ name }) => stem(name) === stem(file.name))) {
      unused.push(`${file.name}: a photo of this name is there already`);
    } else {
      const url = URL.createObjectURL(file);
      photos.push({ name: file.name, file, url, caption: "", cut: await shareCut(url) });
    }
  }
  for (const [name, text] of captions) {
    const photo = photos.find((one) => stem(one.name) === name);
    if (photo) photo.caption = text;
    else unused.push(`${name}.txt is the caption of no photo`);
  }
  show(unused);
}

const stem = (name) => name.replace(/\.[^.]+$/, "");

/** The share of a photo that its middle square leaves out; null where this browser cannot show it (HEIC, TIFF). */
async function shareCut(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return null;
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  return 1 - Math.min(width, height) / Math.max(width, height);
}

function show(unused) {
  byId("photo-list").replaceChildren(...photos.map(photoRow));
  byId("photo-count").textContent = photos.length
    ? `${plural(photos.length, "photo")}${photos.length < 3 ? "; three or more teach better" : ""}`
    : "";
  byId("photo-notes").replaceChildren(...unused.map((text) => el("li", {}, `Not used: ${text}.`)));
  changed();
}

/** Say again what depends on the form's fields: captions, the template in the empty ones, and what crops cut off. */
export function showFields(token, template) {
  const whole = byId("buckets").checked;
  const cut = whole ? 0 : photos.filter(({ cut: share }) => share > MOST_CUT).length;
  byId("crop-note").textContent = cut
    ? `Of ${plural(cut, "photo")} more than a third is cut off. Under More, “Keep each photo's shape” keeps it.`
    : "";
  for (const [index, row] of [...byId("photo-list").children].entries()) {
    const input = row.querySelector("textarea");
    const fault = captionFault(photos[index].caption, token);
    input.placeholder = template;
    input.setAttribute("aria-invalid", String(fault !== null));
    row.querySelector(".field-error").textContent = fault ?? "";
    row.querySelector("img")?.classList.toggle("whole", whole);
  }
}

function photoRow(photo) {
  const caption = el(
    "textarea",
    {
      rows: 2,
      maxlength: 1000,
      "aria-label": `Caption of ${photo.name}`,
      oninput: (event) => {
        photo.caption = event.target.value;
        changed();
      },
    },
    photo.caption,
  );
  return el(
    "li.photo",
    {},
    photo.cut === null
      ? el("span.unseen", {}, "This browser cannot show it; the service can read it")
      : el("img", { src: photo.url, alt: `${photo.name} as it is cropped` }),
    el(
      "div",
      {},
      el("p.photo-name", {}, photo.name),
      caption,
      el("p.field-error", {}),
      el(
        "button.small",
        {
          type: "button",
          "aria-label": `Remove ${photo.name}`,
          onclick: () => {
            URL.revokeObjectURL(photo.url);
            photos = photos.filter((one) => one !== photo);
            show([]);
            byId("photo-files").focus();
          },
        },
        "Remove",
      ),
    ),
  );
}
