//! Huffman codes and the bits they are read from (T.81, annexes C and F).

/// Codes up to this length are found with one look-up.
const FAST_BITS: u32 = 9;

/// A Huffman table.
pub(super) struct HuffmanTable {
    /// By the next `FAST_BITS` bits: code length and symbol; length 0 for longer codes.
    fast: [(u8, u8); 1 << FAST_BITS],
    /// By code length: one past the last code, aligned to 16 bits; 0 where there is none.
    ends: [u32; 17],
    /// By code length: what to add to a code to get its symbol's index.
    offsets: [i32; 17],
    symbols: Vec<u8>,
}

impl HuffmanTable {
    /// A table as DHT holds it: 16 counts and the symbols. Returns what follows it, too.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), String> {
        let bad = || "the JPEG image has a bad Huffman table".to_owned();
        let (counts, rest) = bytes.split_first_chunk::<16>().ok_or_else(bad)?;
        let total = counts.iter().map(|count| usize::from(*count)).sum();
        let (symbols, rest) = rest.split_at_checked(total).ok_or_else(bad)?;
        let mut table = Self {
            fast: [(0, 0); 1 << FAST_BITS],
            ends: [0; 17],
            offsets: [0; 17],
            symbols: symbols.to_vec(),
        };
        let (mut code, mut index) = (0_u32, 0_usize);
        for (length, count) in (1_u32..).zip(counts.iter().map(|count| u32::from(*count))) {
            if code + count > 1 << length {
                return Err(bad());
            }
            table.offsets[length as usize] = index as i32 - code as i32;
            for symbol in &symbols[index..index + count as usize] {
                if length <= FAST_BITS {
                    let spare = FAST_BITS - length;
                    let first = (code << spare) as usize;
                    table.fast[first..first + (1 << spare)].fill((length as u8, *symbol));
                }
                code += 1;
            }
            index += count as usize;
            table.ends[length as usize] = if count > 0 { code << (16 - length) } else { 0 };
            code <<= 1;
        }
        Ok((table, rest))
    }
}

/// Reads bits of entropy-coded data; past its end, at the next marker, come zeros.
pub(super) struct BitReader<'a> {
    data: &'a [u8],
    /// The next byte to take.
    at: usize,
    /// Bits taken but not consumed, from the highest bit downwards.
    bits: u64,
    count: u32,
    /// Zero bits made up after the end.
    padding: u32,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, bits: 0, count: 0, padding: 0 }
    }

    /// Whether made-up bits have been consumed.
    pub(super) fn exhausted(&self) -> bool {
        self.padding > self.count
    }

    /// Bytes taken; the next marker is at or after this place.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Drops the rest of a restart interval and goes behind its marker; without one, the
    /// data is exhausted.
    pub(super) fn restart(&mut self) {
        (self.bits, self.count, self.padding) = (0, 0, 0);
        while let Some(pair) = self.data.get(self.at..self.at + 2) {
            match pair {
                [0xff, 0xd0..=0xd7] => {
                    self.at += 2;
                    return;
                }
                [0xff, 0x01..=0xfe] => break,
                _ => self.at += 1,
            }
        }
        self.padding = 1;
    }

    /// Makes at least 32 bits available.
    #[inline]
    fn fill(&mut self) {
        if self.count >= 32 {
            return;
        }
        // Four plain bytes at once, which is nearly always.
        if let Some(&four) = self.data.get(self.at..).and_then(|rest| rest.first_chunk::<4>()) {
            if !four.contains(&0xff) {
                self.bits |= u64::from(u32::from_be_bytes(four)) << (32 - self.count);
                self.count += 32;
                self.at += 4;
                return;
            }
        }
        while self.count <= 56 {
            let byte = match self.data.get(self.at..).unwrap_or_default() {
                [0xff, 0x00, ..] => {
                    self.at += 2;
                    0xff
                }
                [0xff, 0xff, ..] => {
                    self.at += 1;
                    continue;
                }
                [] | [0xff, ..] => {
                    self.padding += 8;
                    0
                }
                [byte, ..] => {
                    self.at += 1;
                    *byte
                }
            };
            self.bits |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline]
    fn consume(&mut self, count: u32) {
        self.bits <<= count;
        self.count -= count;
    }

    /// The next `count` (0..=16) bits as a number.
    #[inline]
    pub(super) fn take(&mut self, count: u32) -> i32 {
        self.fill();
        // Two shifts, because a shift by 64 is none at all.
        let value = (self.bits >> 1 >> (63 - count)) as i32;
        self.consume(count);
        value
    }

    /// One bit.
    #[inline]
    pub(super) fn bit(&mut self) -> bool {
        self.take(1) != 0
    }

    /// A number of `count` (0..=16) bits in JPEG's signed form (T.81, F.2.2.1).
    #[inline]
    pub(super) fn signed(&mut self, count: u32) -> i32 {
        let value = self.take(count);
        if count > 0 && value < 1 << (count - 1) { value - (1 << count) + 1 } else { value }
    }

    /// The next symbol.
    #[inline]
    pub(super) fn symbol(&mut self, table: &HuffmanTable) -> Result<u8, String> {
        self.fill();
        let (length, symbol) = table.fast[(self.bits >> (64 - FAST_BITS)) as usize];
        if length > 0 {
            self.consume(length.into());
            return Ok(symbol);
        }
        let code = (self.bits >> 48) as u32;
        for length in FAST_BITS + 1..=16 {
            if code < table.ends[length as usize] {
                self.consume(length);
                let index = (code >> (16 - length)) as i32 + table.offsets[length as usize];
                let symbol = usize::try_from(index).ok().and_then(|at| table.symbols.get(at));
                return symbol.copied().ok_or_else(|| "the JPEG data is damaged".into());
            }
        }
        Err("the JPEG data is damaged".into())
    }
}
