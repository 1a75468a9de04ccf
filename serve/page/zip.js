// A zip of files as they are: photos are compressed already. PKWARE's APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.16.

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value >>> 0;
});
const UTF8_NAMES = 0x0800;
const NEW_YEAR_1980 = 0x21; // the first day a zip can tell: equal photos make equal archives

function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = (value >>> 8) ^ TABLE[(value ^ byte) & 0xff];
  return ~value >>> 0;
}

/** Little-endian numbers: pairs of [value, bytes]. */
function packed(...numbers) {
  const bytes = [];
  for (const [value, length] of numbers) for (let at = 0; at < length; at++) bytes.push((value >>> (8 * at)) & 0xff);
  return Uint8Array.from(bytes);
}

/** A Blob of `[[name, Blob], ...]`, stored without compression. */
export async function zipped(members) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of members) {
    const data = new Uint8Array(await blob.arrayBuffer());
    const spelt = new TextEncoder().encode(name);
    const about = [
      [20, 2], // made for version 2.0
      [UTF8_NAMES, 2],
      [0, 2],
      [0, 2],
      [NEW_YEAR_1980, 2],
      [crc32(data), 4],
      [data.length, 4],
      [data.length, 4],
      [spelt.length, 2],
      [0, 2],
    ];
    const head = packed([0x04034b50, 4], ...about);
    directory.push(packed([0x02014b50, 4], [20, 2], ...about, [0, 2], [0, 2], [0, 2], [0, 4], [offset, 4]), spelt);
    parts.push(head, spelt, data);
    offset += head.length + spelt.length + data.length;
  }
  const listed = directory.reduce((sum, part) => sum + part.length, 0);
  const end = packed(
    [0x06054b50, 4],
    [0, 2],
    [0, 2],
    [members.length, 2],
    [members.length, 2],
    [listed, 4],
    [offset, 4],
    [0, 2],
  );
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
