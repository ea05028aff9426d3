//! UBB, "upper bit bound": token-wise mixed bits, channel groups, shifted post-GELU.
//!
//! Source: the open-source Transformer quantization platform of Yonsei University (row "Ours");
//! the matching publication seems to be "Token-based dynamic bit-width assignment for ViT
//! quantization", Pattern Recognition 171 (2026). Specification: methods/ubb.md. Where the
//! released code has a defect, the option `variant` chooses between it and the corrected rule.

mod allocation;
mod quantizers;
mod search;

use tch::{Kind, Tensor};

use crate::calib::capture::{LazyCalibration, QuantizerSource};
use crate::calib::report::{Seen, SiteLog};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::kernels::passes::select::lower_median;
use crate::methods::{Method, MethodEntry, MethodOptions, OptionKind, OptionSpec};
use crate::nn::{Operand, Role, Site};
use crate::quant::dense::Dense;
use crate::quant::dynamic::{ConstantRows, DynamicToken};
use crate::quant::log2::{Log2Row, ZeroCode};
use crate::quant::quantizer::boxed;
use crate::quant::tokens::TokenLayout;
use crate::quant::uniform::{MIN_WEIGHT_SCALE, Range, Uniform};
use crate::quant::{BitWidth, Quantizer};
use crate::tensor::quantile_range;

use allocation::{Allocation, Scalars};
use quantizers::{GridRules, MAX_SHIFT, UbbAttention, UbbLinear, shift_exponent};
use search::{Problem, search, shift_threshold};

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "ubb",
    summary: "token-wise mixed bits (mean n), channel groups, shifted post-GELU, row-wise log2 scores",
    source: "Transformer quantization platform (Yonsei), \"Ours\"; methods/ubb.md",
    options: OPTIONS,
    build: || Box::new(Ubb),
    restore: |state| match state.kind.as_str() {
        quantizers::LINEAR_KIND => boxed(UbbLinear::restore(state)),
        quantizers::ATTENTION_KIND => boxed(UbbAttention::restore(state)),
        _ => None,
    },
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "variant",
        help: "corrected rules, or what the released code computes (its quirks Q1–Q3, Q10)",
        kind: OptionKind::Choice(&["corrected", "released"]),
        default: "corrected",
    },
    OptionSpec {
        name: "groups",
        help: "channel groups of a linear input; must divide every channel count",
        kind: OptionKind::Int { min: 1, max: 1024 },
        default: "8",
    },
    OptionSpec {
        name: "token0_priority",
        help: "always raise token 0: where it is a class token, always (released), or never",
        kind: OptionKind::Choice(&["variant", "class_token", "always", "never"]),
        default: "variant",
    },
    OptionSpec {
        name: "swin_window_regroup",
        help: "share the parameters of attention operands between the windows of a quadrant",
        kind: OptionKind::Bool,
        default: "true",
    },
    OptionSpec {
        name: "zero_code",
        help: "softmax zero: an extra symbol (released), or the last of 2^n codes (strict n bits)",
        kind: OptionKind::Choice(&["extra", "last"]),
        default: "extra",
    },
    OptionSpec {
        name: "weight_epsilon",
        help: "share of a weight channel's values clipped at each end",
        kind: OptionKind::Float { min: 0.0, max: 0.49 },
        default: "0.0001",
    },
];

#[derive(Debug)]
struct Ubb;

impl Method for Ubb {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let model = task.model()?;
        let images = task.images.shallow_clone();
        let settings = Settings::read(&task.options, task.spec.has_class_token())?;
        let log = SiteLog::new(task, "calibrate", model.units.len());
        let mut source = Source { log, settings };
        let mut executor = LazyCalibration::new(&mut source);
        let _logits = model.forward(&mut executor, &images)?;
        let plan = executor.plan;
        Ok(Quantization { plan, report: source.log.finish(), ..Quantization::default() })
    }
}

/// Whether tokens differ in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenBits {
    /// n−1, n or n+1 bits, n on average.
    Mixed,
    /// n bits each.
    Equal,
}

/// The options, resolved for a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    released: bool,
    groups: i64,
    tokens: TokenBits,
    token0_priority: bool,
    regroup: bool,
    zero_code: ZeroCode,
    weight_epsilon: f64,
}

impl Settings {
    fn read(options: &MethodOptions, has_class_token: bool) -> Result<Self> {
        let released = options.choice("variant")? == "released";
        let token0_priority = match options.choice("token0_priority")? {
            "always" => true,
            "never" => false,
            "class_token" => has_class_token,
            _ => released || has_class_token,
        };
        Ok(Self {
            released,
            groups: options.int("groups")?,
            tokens: TokenBits::Mixed,
            token0_priority,
            regroup: options.bool("swin_window_regroup")?,
            zero_code: if options.choice("zero_code")? == "last" {
                ZeroCode::Last
            } else {
                ZeroCode::Extra
            },
            weight_epsilon: options.float("weight_epsilon")?,
        })
    }

    /// Q2: at 8 bits n+1 would not fit a byte; only the released code mixes there.
    fn mixes(self, bits: BitWidth) -> bool {
        self.tokens == TokenBits::Mixed && (self.released || bits < BitWidth::EIGHT)
    }

    fn constants(self) -> ConstantRows {
        if self.released { ConstantRows::SmallestScale } else { ConstantRows::Exact }
    }

    pub(super) fn layout(self, site: &Site) -> TokenLayout {
        if self.regroup { TokenLayout::regrouped(site.windows) } else { TokenLayout::PLAIN }
    }
}

/// Makes the quantizer of each operand from already quantized upstream activations (section 9).
struct Source<'t, 'p> {
    log: SiteLog<'t, 'p>,
    settings: Settings,
}

impl QuantizerSource for Source<'_, '_> {
    fn quantizer(
        &mut self,
        site: &Site,
        operand: Operand,
        x: &Tensor,
    ) -> Result<Option<Box<dyn Quantizer>>> {
        let task = self.log.task();
        if operand == Operand::Rhs && !site.role.is_matmul() {
            let bits = task.weight_bits(site.role);
            return bits.map_or(Ok(None), |bits| self.weight(x, bits));
        }
        let Some(bits) = task.activation_bits(site.role) else { return Ok(None) };
        match (site.role, operand) {
            // Pixels are 8-bit data; the source never quantizes them (nor the head's input) at all.
            (Role::Embed, _) => Ok(Some(Box::new(DynamicToken::new(BitWidth::EIGHT)))),
            (Role::Head, _) => Ok(Some(Box::new(DynamicToken::new(bits)))),
            (Role::ScoreValue, Operand::Lhs) => {
                let layout = self.settings.layout(site);
                Ok(Some(Box::new(Log2Row::new(bits, self.settings.zero_code, layout))))
            }
            (Role::QueryKey | Role::ScoreValue, _) => self.attention(site, x, bits),
            (Role::Qkv | Role::Proj | Role::Fc1 | Role::Fc2 | Role::Reduction, _) => {
                self.linear(site, x, bits)
            }
        }
    }

    fn quantized(&mut self, seen: &Seen<'_>) -> Result<()> {
        self.log.record(seen)
    }
}

impl Source<'_, '_> {
    /// Per output channel, clipped at the ε-quantiles (section 3).
    fn weight(&self, weight: &Tensor, bits: BitWidth) -> Result<Option<Box<dyn Quantizer>>> {
        if self.settings.released && bits >= BitWidth::EIGHT {
            return Ok(None); // Q1: the released weight quantizer returns its input at 8 bits.
        }
        let (low, high) = quantile_range(weight, 1.0 - self.settings.weight_epsilon)?;
        Ok(Some(Box::new(Uniform::from_range(&Range { low, high }, bits, MIN_WEIGHT_SCALE)?)))
    }

    fn linear(
        &mut self,
        site: &Site,
        x: &Tensor,
        bits: BitWidth,
    ) -> Result<Option<Box<dyn Quantizer>>> {
        let groups = self.settings.groups;
        self.settings.check_groups(site, x)?;
        let shift = Shift::of(site.role);
        let task = self.log.task();
        let quantizer =
            self.settings.linear(x, bits, shift, &|| task.progress.check_cancelled())?;
        if let Some(tau) = quantizer.rules.tau {
            let range = Range::per_row(&UbbLinear::grouped(x, groups)?)?;
            let largest = shift_exponent(&range, tau)?.f_max()?.f_double_value(&[])?;
            if largest > MAX_SHIFT {
                let path = &site.path;
                self.log.warn(format!(
                    "{path}: a post-GELU shift of {largest} was capped at {MAX_SHIFT}"
                ));
            }
        }
        Ok(Some(Box::new(quantizer)))
    }

    fn attention(
        &mut self,
        site: &Site,
        x: &Tensor,
        bits: BitWidth,
    ) -> Result<Option<Box<dyn Quantizer>>> {
        let task = self.log.task();
        let layout = self.settings.layout(site);
        Ok(Some(Box::new(
            self.settings.attention(x, bits, layout, &|| task.progress.check_cancelled())?,
        )))
    }
}

/// Whether a linear input's negatives are shifted (section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    None,
    PostGelu,
}

impl Shift {
    /// Only fc2's input comes from a GELU.
    pub(super) fn of(role: Role) -> Self {
        if role == Role::Fc2 { Self::PostGelu } else { Self::None }
    }
}

/// Asked between chunks of a search.
pub(super) type Stop<'a> = &'a dyn Fn() -> Result<()>;

impl Settings {
    /// The corrected rules with the defaults of every other option.
    pub(super) fn corrected(groups: i64, tokens: TokenBits, has_class_token: bool) -> Self {
        Self {
            released: false,
            groups,
            tokens,
            token0_priority: has_class_token,
            regroup: true,
            zero_code: ZeroCode::Extra,
            weight_epsilon: 1e-4,
        }
    }

    /// A quantizer of linear inputs that gives every token the same bits and so needs no search.
    pub(super) fn equal_bits(self, bits: BitWidth) -> UbbLinear {
        let allocation = Allocation { bits, mixed: false, token0_priority: false, min_swaps: 0 };
        let rules = GridRules { tau: None, constants: self.constants() };
        UbbLinear { allocation, scalars: Scalars::default(), groups: self.groups, rules }
    }

    /// Refuses a group count that does not divide the channels of x [.., channels].
    pub(super) fn check_groups(self, site: &Site, x: &Tensor) -> Result<()> {
        let (groups, channels) = (self.groups, x.size().last().copied().unwrap_or(0));
        if channels % groups == 0 {
            return Ok(());
        }
        let reason =
            format!("{groups} groups do not divide the {channels} channels of {}", site.path);
        Err(Error::invalid("options.groups", reason))
    }

    /// Calibrates the quantizer of a linear input x [images, tokens, channels].
    pub(super) fn linear(
        self,
        x: &Tensor,
        bits: BitWidth,
        shift: Shift,
        stop: Stop<'_>,
    ) -> Result<UbbLinear> {
        let allocation = Allocation {
            bits,
            mixed: self.mixes(bits),
            token0_priority: self.token0_priority,
            min_swaps: 1,
        };
        let tau = (shift == Shift::PostGelu).then_some(0.0);
        let rules = GridRules { tau, constants: self.constants() };
        let problem = Problem {
            tokens: x,
            groups: self.groups,
            allocation,
            statistics: statistics(x)?,
            rules,
        };
        let (scalars, tau) = fit(&problem, stop)?;
        Ok(UbbLinear {
            allocation,
            scalars,
            groups: self.groups,
            rules: GridRules { tau, ..rules },
        })
    }

    /// Calibrates the quantizer of q, k or vᵀ, x [images·windows, heads, free, reduce].
    pub(super) fn attention(
        self,
        x: &Tensor,
        bits: BitWidth,
        layout: TokenLayout,
        stop: Stop<'_>,
    ) -> Result<UbbAttention> {
        let mixed = self.mixes(bits);
        let allocation = Allocation { bits, mixed, token0_priority: false, min_swaps: 0 };
        let constants = self.constants();
        let rules = GridRules { tau: None, constants };
        let tokens = layout.to_tokens(x)?;
        let statistics = statistics(&tokens)?;
        let (scalars, _) =
            fit(&Problem { tokens: &tokens, groups: 1, allocation, statistics, rules }, stop)?;
        Ok(UbbAttention { allocation, scalars, layout, constants })
    }
}

/// Statistics and the searched scalars of an operand; τ where the rules have one.
fn fit(problem: &Problem<'_>, stop: Stop<'_>) -> Result<(Scalars, Option<f64>)> {
    let statistics = problem.statistics;
    let bits = problem.allocation.bits.get();
    if statistics.kappa == 0.0 {
        // A constant tensor: nothing to allocate (section 13, test 5).
        let scalars = Scalars { beta: 0.0, threshold: search::threshold(0, bits), ..statistics };
        return Ok((scalars, problem.rules.tau));
    }
    let found = search(problem, stop)?;
    let scalars = Scalars {
        beta: search::beta(found.beta),
        threshold: search::threshold(found.threshold, bits),
        ..statistics
    };
    Ok((scalars, problem.rules.tau.map(|_| shift_threshold(found.shift))))
}

/// κ = std/(max − min), unbiased, and μ = lower median of the whole tensor (section 4).
fn statistics(x: &Tensor) -> Result<Scalars> {
    let width = x.f_max()?.f_sub(&x.f_min()?)?;
    let kappa = x.f_std(true)?.f_div(&width)?.f_double_value(&[])?;
    let mu = match Dense::of(x)? {
        Some(dense) => f64::from(lower_median(dense.values()?)),
        None => x.f_median()?.f_double_value(&[])?,
    };
    debug_assert_eq!(x.kind(), Kind::Float);
    // 0/0 of a constant tensor: κ = 0 by definition.
    Ok(Scalars { mu, kappa: if kappa.is_finite() { kappa } else { 0.0 }, ..Scalars::default() })
}

#[cfg(test)]
mod tests;
