//! Images in the formats that are decoded, for tests.

use super::Format;

/// An image of rows of R, G, B. JPEG keeps its colours roughly, the others exactly.
pub(crate) fn encoded(format: Format, width: u32, pixels: &[u8]) -> Vec<u8> {
    let height = pixels.len() as u32 / (3 * width);
    let mut bytes = Vec::new();
    match format {
        Format::Jpeg => {
            let [columns, rows] = [width, height].map(|n| n as usize);
            let image = turbojpeg::Image {
                pixels,
                width: columns,
                pitch: 3 * columns,
                height: rows,
                format: turbojpeg::PixelFormat::RGB,
            };
            let jpeg = turbojpeg::compress(image, 75, turbojpeg::Subsamp::Sub2x2).unwrap();
            bytes.extend_from_slice(&jpeg);
        }
        Format::Png => {
            let mut encoder = ::png::Encoder::new(&mut bytes, width, height);
            encoder.set_color(::png::ColorType::Rgb);
            encoder.write_header().unwrap().write_image_data(pixels).unwrap();
        }
        Format::Webp => {
            let encoder = image_webp::WebPEncoder::new(&mut bytes);
            encoder.encode(pixels, width, height, image_webp::ColorType::Rgb8).unwrap();
        }
    }
    bytes
}
