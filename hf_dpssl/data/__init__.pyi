from .batches import ImageSource as ImageSource
from .image_data import ImageData as ImageData
from .image_data import load_images as load_images
from .image_table import ImageTable as ImageTable
from .views import Augmentation as Augmentation
from .views import TwoViews as TwoViews
