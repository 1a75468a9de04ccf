"""What every image of a model says of itself: that the model drew or edited it, in XMP, by IPTC's source types."""

from __future__ import annotations

SOFTWARE = "cat-cluster"
# https://cv.iptc.org/newscodes/digitalsourcetype/: "created using a generative AI model", and "edited using" one.
_DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
XMP_CHUNK = "XML:com.adobe.xmp"  # the keyword of PNG's text chunk that holds XMP (XMP specification, part 3, 1.1.5)


def digital_source_type(*, edited: bool) -> str:
    """Return IPTC's code for an image that a model drew or, of an image that it was given, `edited`."""
    return _EDITED if edited else _DRAWN


def xmp_packet(*, edited: bool) -> str:
    """Return the XMP of an image that a model drew or, of an image that it was given, `edited`."""
    # Without the package's version: after an upgrade the same image is the same file, and the same object of a
    # registry.
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/">
   <Iptc4xmpExt:DigitalSourceType>{digital_source_type(edited=edited)}</Iptc4xmpExt:DigitalSourceType>
   <xmp:CreatorTool>{SOFTWARE}</xmp:CreatorTool>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
