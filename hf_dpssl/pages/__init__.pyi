from .live_map import LiveMap as LiveMap
from .map_page import write_map_page as write_map_page
from .picture_stream import snippet as snippet
from .picture_stream import stream as stream
